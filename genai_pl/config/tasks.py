"""Options of evaluation tasks in which a model writes: how it decodes, and how a completion is scored."""

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError

IGNORABLE = ("case", "punctuation", "articles", "spaces", "number_format")
PROGRAM_OPTIONS = {"seconds", "memory_mib"}
MATCH_OPTIONS = {"extract", "ignore"}
MAX_SAMPLES = 1000
LONGEST = 256  # tokens of a completion where max_new_tokens is null, and the context has as many for the prompt


@dataclass
class GenerationTaskOptions:
    """Options of a task in which the model writes; conf/evaluate.yaml explains each.

    Raises ConfigError for a value out of range, and for options that exclude each other, under the names of evaluate.py
    (`data.NAME`).
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    samples: int = 1
    k: list[int] = field(default_factory=lambda: [1])
    stop: list[str] | None = None
    chat: bool = False
    extract: str | None = None
    ignore: list[str] = field(default_factory=list)
    score: str | None = None
    judge: str | None = None
    rubric: str = ""
    seconds: float = 5.0
    memory_mib: int = 512
    seed: int = 0

    def check(self) -> None:
        """ConfigError for a value that cannot work."""
        least = {"max_new_tokens": 1, "samples": 1, "memory_mib": 64, "seed": 0, "temperature": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ConfigError(f"data.{name}={value} must be at least {bound}")
        if not 0 < self.seconds <= 3600:
            raise ConfigError(f"data.seconds={self.seconds} must be above 0, and at most 3600")
        if self.samples > MAX_SAMPLES:
            raise ConfigError(f"data.samples={self.samples} must be at most {MAX_SAMPLES}")
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise ConfigError(
                f"data.k={list(self.k)}: pass@k needs k from 1 to data.samples={self.samples}; raise data.samples"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(f"data.samples={self.samples}: data.temperature=0 gives the same one each time")
        if unknown := [word for word in self.ignore if word not in IGNORABLE]:
            raise ConfigError(f"data.ignore={unknown[0]}: not one of {', '.join(IGNORABLE)}")
        if self.score is not None and self.judge is not None:
            raise ConfigError("data.score and data.judge both score completions: give one of them")
        if self.rubric and self.judge is None:
            raise ConfigError("data.rubric is read by data.judge: give both, or leave it out")
        self._check_pattern()
        self.decoding([])

    def _check_pattern(self) -> None:
        """ConfigError for a pattern that is no regular expression, or has several groups."""
        if self.extract is None:
            return
        try:
            groups = re.compile(self.extract).groups
        except re.error as error:
            raise ConfigError(f"data.extract={self.extract}: no regular expression ({error})") from None
        if groups > 1:
            raise ConfigError(f"data.extract={self.extract}: {groups} groups; keep one, the answer, and write (?:...)")

    def longest(self, seq_len: int) -> int:
        """Tokens of a completion at most, for a model that reads seq_len tokens."""
        return min(LONGEST, seq_len // 2) if self.max_new_tokens is None else self.max_new_tokens

    def decoding(self, stop: list[str], seq_len: int = 2 * LONGEST) -> GenerationConfig:
        """The decoding settings: greedy for one sample, at temperature 0.8 for several unless `temperature` says so.

        stop: texts that end a completion where the option `stop` is null. seq_len: tokens that the model reads.
        """
        temperature = (0.8 if self.samples > 1 else 0.0) if self.temperature is None else self.temperature
        try:
            return GenerationConfig(
                max_new_tokens=self.longest(seq_len),
                temperature=temperature,
                top_p=self.top_p,
                stop=list(stop if self.stop is None else self.stop),
            )
        except ConfigError as error:
            raise ConfigError(str(error).replace("generation.", "data.")) from None

    def refuse(self, names: AbstractSet[str], why: str) -> None:
        """ConfigError for the first of these options that differs from its default."""
        default = GenerationTaskOptions()
        for name in sorted(names):
            if (value := getattr(self, name)) != getattr(default, name):
                raise ConfigError(f"data.{name}={value}: has no effect: {why}; leave it out")


NAMES = tuple(f.name for f in fields(GenerationTaskOptions))
