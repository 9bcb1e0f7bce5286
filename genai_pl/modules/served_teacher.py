"""Served teacher: a model behind OpenAI's completions, asked for the likeliest tokens at every position of a prompt.

A prompt is echoed with its log-probabilities (`echo`, `logprobs`, no token written), and tokens are named by their ids
(`return_tokens_as_token_ids`, of vLLM and of serve.py), since several tokens may have one text. The probability of all
other tokens is 1 minus the sum of those that are named. Probabilities are at temperature 1: another one would need the rest.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genai_pl.endpoints import Endpoint
from genai_pl.errors import ConfigError
from genai_pl.modules.base import Batch
from genai_pl.modules.teachers import RowTeacher, Taught, check_ids, likeliest
from genai_pl.objectives import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTION = "objective.teacher"
PREFIX = "token_id:"  # of the names of tokens
MOST = 1.01  # what the probabilities of the likeliest tokens add up to at most, in 16 bits
LOWEST = -1e4  # log-probabilities at least: minus infinity times its probability would be nan
LEAST = 2.0**-24  # the probability of all other tokens at least: sums of float32 are no more exact
PROBED = 512  # tokens whose texts are compared before anything is learned
UNDECODED = "\ufffd"  # what stands for the bytes of half a character


@dataclass(frozen=True)
class Server:
    """How a server is asked.

    model: its name there, None for the first that it lists. top_k: likeliest tokens of a position. key_variable: environment
    variable with the key. timeout: seconds of one request. retries: further attempts. workers: requests at a time.
    """

    model: str | None = None
    top_k: int = 20
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 120.0
    retries: int = 5
    workers: int = 4

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("retries", 0), ("workers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"objective.server.{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"objective.server.timeout must be above 0 seconds, not {self.timeout}")


class Prompt(NamedTuple):
    """A document as a server reads it: tokens, the label of the last position among them, and places (n,) of the flattened
    rows at which the tokens after the first are predicted."""

    tokens: list[int]
    places: Tensor


class ServedTeacher(RowTeacher):
    """A teacher behind an address, in the place of a model beside the student.

    url: of the API, up to and with /v1. server: how it is asked. top_k: likeliest tokens of a position.
    vocab_size: the student's. option: that names the address.
    """

    def __init__(self, url: str, server: Server, *, top_k: int, vocab_size: int, option: str = OPTION) -> None:
        key = os.environ.get(server.key_variable, "")
        self.endpoint = Endpoint(url, option, key, timeout=server.timeout, retries=server.retries)
        self.top_k, self.vocab_size, self.workers = top_k, vocab_size, server.workers
        try:
            listed = {entry["id"]: entry for entry in self.endpoint.ask("models")["data"]}
            self.model = server.model or next(iter(listed))
        except (KeyError, TypeError, StopIteration):
            raise self.endpoint.error("lists no models; the address ends in /v1") from None
        if self.model not in listed:
            found = ", ".join(map(str, listed))
            raise self.endpoint.error(f"objective.server.model={self.model} is not there; found: {found}")
        longest = listed[self.model].get("max_model_len")
        # one position is for the token after the last one
        self.context = longest - 1 if isinstance(longest, int) else None

    def fingerprint(self, precision: str) -> str:
        return hashlib.sha256(f"{self.endpoint.url}\n{self.model}".encode()).hexdigest()[:32]

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """ConfigError where tokens have another text there: ids are handed on, and must mean the same."""
        n = min(PROBED, PROBED if self.context is None else max(self.context, 1), len(tokenizer))
        ids = [round(i * (len(tokenizer) - 1) / max(n - 1, 1)) for i in range(n)]
        found = self._echo(ids, logprobs=0).get("tokens")
        self._check_positions(found, n)
        if all(str(name).startswith(PREFIX) for name in found):
            raise self.endpoint.error(
                "names tokens by ids where their texts are asked for, by which tokenizers are compared"
            )
        for token, there in zip(ids, found, strict=True):
            here = tokenizer.decode([token], skip_special_tokens=False)
            if UNDECODED not in here + str(there) and here.strip() != str(there).strip():
                raise self.endpoint.error(
                    f"its tokenizer is another one than the student's: token {token} is {str(there)[:40]!r} there and "
                    f"{here[:40]!r} here; start from the teacher's tokenizer (init_from=, or tokenizer=pretrained)"
                )

    def __call__(self, batch: Batch, labels: Tensor) -> Taught:
        """Log-probabilities and ids of the likeliest tokens; zeros where labels (B, T) has nothing to learn."""
        segments = batch.get("segment_ids", torch.ones_like(batch["input_ids"]))
        prompts = list(prompts_of(batch["input_ids"].cpu(), labels.cpu(), segments.cpu()))
        logprobs = torch.zeros(labels.numel(), self.top_k + 1)
        ids = torch.zeros(labels.numel(), self.top_k, dtype=torch.long)
        with ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(self._predictions, [prompt.tokens for prompt in prompts])
            for prompt, (values, tokens) in zip(prompts, answers, strict=True):
                logprobs[prompt.places], ids[prompt.places] = values, tokens
        check_ids(ids, self.vocab_size, source=f"{self.endpoint.option}={self.endpoint.url}")
        return Taught(likeliest(logprobs.to(labels.device), ids.to(labels.device)))

    def _predictions(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n - 1, K + 1) and ids (n - 1, K) of what may follow each of n tokens but the last."""
        tops = self._echo(tokens, logprobs=self.top_k, return_tokens_as_token_ids=True).get("top_logprobs")
        self._check_positions(tops, len(tokens))
        if not all(isinstance(top, dict) for top in tops[1:]):
            raise self._no_logprobs()
        pairs = [self._likeliest(top) for top in tops[1:]]
        ids = torch.tensor([[token for token, _ in row] for row in pairs])
        values = torch.tensor([[value for _, value in row] for row in pairs], dtype=torch.float64).clamp(min=LOWEST)
        total = values.exp().sum(1, keepdim=True)
        if not (total <= MOST).all():  # nan is no number below it
            raise self.endpoint.error(f"gives likeliest tokens whose probabilities add up to {float(total.max()):.4g}")
        others = (1 - total).clamp(min=LEAST).log()
        return torch.cat([values, others], dim=1).log_softmax(1).float(), ids

    def _likeliest(self, top: dict[str, float]) -> list[tuple[int, float]]:
        """The K likeliest tokens of a position with their log-probabilities; the prompt's own may be named beside them."""
        try:
            pairs = [(int(name.removeprefix(PREFIX)), float(value)) for name, value in top.items()]
        except (ValueError, TypeError):
            pairs = []
        if len({token for token, _ in pairs}) != len(top) or not all(name.startswith(PREFIX) for name in top):
            raise self.endpoint.error(
                f"names tokens by their text, as {next(iter(top))[:20]!r}, which several have; a server is needed that knows "
                "return_tokens_as_token_ids (vLLM, serve.py)"
            )
        if len(pairs) < self.top_k:
            raise self.endpoint.error(f"gives {len(pairs)} tokens of a position, and {self.top_k} are asked for")
        return sorted(pairs, key=lambda pair: -pair[1])[: self.top_k]

    def _echo(self, tokens: Sequence[int], **options: object) -> dict[str, object]:
        """`logprobs` of a prompt's tokens."""
        body = {"model": self.model, "prompt": list(tokens), "echo": True, "max_tokens": 0, "temperature": 1.0}
        try:
            return self.endpoint.ask("completions", {**body, **options})["choices"][0]["logprobs"] or {}
        except (KeyError, IndexError, TypeError):
            raise self._no_logprobs() from None

    def _check_positions(self, found: object, n: int) -> None:
        """ConfigError unless there is something for each of n tokens that were sent."""
        if not isinstance(found, list) or not found:
            raise self._no_logprobs()
        if len(found) != n:
            raise self.endpoint.error(f"was sent {n} tokens of a prompt and gives log-probabilities of {len(found)}")

    def _no_logprobs(self) -> ConfigError:
        return self.endpoint.error("gives no log-probabilities of a prompt (echo and logprobs of /v1/completions)")


def prompts_of(input_ids: Tensor, labels: Tensor, segments: Tensor) -> Iterator[Prompt]:
    """The documents of rows (B, T) in which something is learned, each up to its last label."""
    T = input_ids.shape[1]
    for row in range(len(input_ids)):
        for number in segments[row][segments[row] > 0].unique().tolist():
            places = (segments[row] == number).nonzero()[:, 0]
            learned = (labels[row, places] != IGNORED).nonzero()[:, 0]
            if len(learned):
                places = places[: int(learned[-1]) + 1]
                # the token that the last position predicts may be beyond the row
                yield Prompt([*input_ids[row, places].tolist(), int(labels[row, places[-1]])], row * T + places)
