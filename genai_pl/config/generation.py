"""Decoding settings: the group `generation`, and the arguments of `genai_pl.generation`."""

from dataclasses import dataclass, field

from genai_pl.errors import ConfigError


@dataclass
class GenerationConfig:
    """Settings of sampling, beam search, constraints and speculative decoding; every field is an option
    `generation.NAME`.

    Processors act on the logits in transformers' order (generation/processors.py). Lengths are in tokens.
    Raises ConfigError for a value out of range, or for fields that contradict each other. Temperatures below
    1e-4 become 0, greedy.
    """

    max_new_tokens: int = 200  # maximum tokens of a continuation
    min_new_tokens: int = 0  # no end token before this many
    temperature: float = 1.0  # below 1 sharpens the distribution, above 1 flattens it; 0: greedy
    top_k: int | None = None  # sample among the k most likely tokens
    top_p: float | None = None  # sample among the most likely tokens with this total probability (nucleus)
    min_p: float | None = None  # sample among tokens with at least this share of the top probability
    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that were generated already, once
    frequency_penalty: float = 0.0  # subtracted from the logit of a token as often as it was generated already
    no_repeat_ngram_size: int | None = None  # no n-gram twice, those of the prompt included
    bad_words: list[str] = field(default_factory=list)  # texts that are never generated, alone or after a space
    prefix: str = ""  # forced beginning of a continuation
    stop: list[str] = field(default_factory=list)  # texts that end a sequence and are not returned
    logit_bias: dict[int, float] = field(default_factory=dict)  # added to the logits of tokens, by token id
    json_schema: str | None = None  # file or text of a JSON schema that the text after the prefix obeys
    regex: str | None = None  # regular expression that the text after the prefix matches as a whole
    num_beams: int = 1  # beams; 1: no beam search
    num_return: int = 1  # best beams to return
    length_penalty: float = 1.0  # scores are divided by length ** length_penalty
    early_stopping: str = "false"  # true: at num_beams finished beams; false: heuristic; never: if none can be better
    num_beam_groups: int = 1  # above 1: diverse beam search
    diversity_penalty: float = 0.0  # subtracted from a token per earlier group's beam that takes it in this step
    draft: str | None = None  # smaller model with the same tokenizer that proposes tokens
    prompt_lookup: int | None = None  # propose what followed an earlier occurrence of the last n tokens (or fewer)
    draft_tokens: int = 8  # maximum tokens proposed at a time
    cuda_graphs: bool = True  # GPU: record a step and replay it where that is faster; false: all steps eager

    def __post_init__(self) -> None:
        self.early_stopping = str(self.early_stopping).lower()
        # lower bounds first, then the fields with their own conditions
        ones = ("max_new_tokens", "top_k", "no_repeat_ngram_size", "prompt_lookup", "draft_tokens")
        ones = dict.fromkeys((*ones, "num_beams", "num_return", "num_beam_groups"), 1)
        least = {**ones, "min_new_tokens": 0, "temperature": 0, "min_p": 0, "diversity_penalty": 0}
        checks = {name: (value := getattr(self, name)) is None or value >= bound for name, bound in least.items()}
        checks["top_p"] = self.top_p is None or 0 < self.top_p <= 1
        checks["min_p"] &= self.min_p is None or self.min_p <= 1
        checks["repetition_penalty"] = self.repetition_penalty > 0
        for name in ("presence_penalty", "frequency_penalty"):
            checks[name] = abs(getattr(self, name)) < float("inf")
        checks["logit_bias"] = all(i >= 0 and abs(value) < float("inf") for i, value in self.logit_bias.items())
        checks["early_stopping"] = self.early_stopping in ("true", "false", "never")
        checks |= {name: all(getattr(self, name)) for name in ("stop", "bad_words")}  # no empty text
        for name, holds in checks.items():
            if not holds:
                raise ConfigError(f"generation.{name}={getattr(self, name)} is out of range")
        if self.temperature < 1e-4:  # logits divided by it overflow: the likeliest token is what is left to draw
            self.temperature = 0.0
        self._check_pairs()

    def _check_pairs(self) -> None:
        """ConfigError for fields that cannot hold together."""
        if self.num_return > self.num_beams:
            raise ConfigError(f"generation.num_return={self.num_return} needs as many generation.num_beams")
        if self.num_beams % self.num_beam_groups:
            raise ConfigError(f"generation.num_beams={self.num_beams} must be a multiple of generation.num_beam_groups")
        if self.num_beams > 1 and self.temperature != 0:
            raise ConfigError("generation.num_beams looks for the likeliest text: set generation.temperature=0")
        if self.num_beams > 1 and self.speculates:
            raise ConfigError("generation.draft and generation.prompt_lookup have no use with generation.num_beams")
        if self.counts_tokens and (self.num_beams > 1 or self.speculates):
            raise ConfigError(
                "generation.presence_penalty and frequency_penalty count what was drawn: leave out num_beams, draft and "
                "prompt_lookup"
            )
        if self.draft is not None and self.prompt_lookup is not None:
            raise ConfigError("generation.draft and generation.prompt_lookup both propose tokens: give one of them")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(f"generation.min_new_tokens={self.min_new_tokens} is more than generation.max_new_tokens")

    @property
    def counts_tokens(self) -> bool:
        """True if a penalty depends on how often a token was generated."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def speculates(self) -> bool:
        """True if a draft model or prompt lookup proposes tokens that the model then verifies in one pass."""
        return self.draft is not None or self.prompt_lookup is not None
