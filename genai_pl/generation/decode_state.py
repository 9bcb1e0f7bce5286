"""What a batch has read, with the cache of it."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from genai_pl.config.enums import Shape
from genai_pl.errors import ConfigError
from genai_pl.models import Decoder, DecoderWithSource


class Context:
    """What a batch has read, at most max_seq_len tokens, with the cache of it.

    When the cache is full, a new one reads the last half of the text again, as if nothing had stood before it:
    positions restart, and no token ever sees more than max_seq_len others.
    """

    def __init__(self, model: Decoder | DecoderWithSource, batch_size: int, n_tokens: int) -> None:
        self.model = model
        self.cache = model.new_cache(batch_size, min(n_tokens, model.config.max_seq_len))
        self.tokens: Tensor | None = None  # (B, n), all that was read or, after a restart, the half of it
        self.segments: Tensor | None = None  # (B, n) likewise, where every read gives them
        self.numbers: Tensor | None = None  # of the rows that are left, where some were dropped

    @property
    def room(self) -> int:
        """How many more tokens fit without a restart."""
        return self.cache.max_length - self.cache.length

    @property
    def n_tokens(self) -> int:
        """How many tokens of the text it holds."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def read(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Logits (B, V) of what follows the tokens (B, T), which follow all that was read before."""
        return self.read_last(input_ids, 1, segment_ids)[:, 0]

    def read_last(self, input_ids: Tensor, n: int, segment_ids: Tensor | None = None) -> Tensor:
        """Logits (B, n, V) of what follows each of the last n of the tokens (B, T); a restart may leave fewer than n."""
        self.tokens = _after(self.tokens, input_ids)
        if segment_ids is not None:
            self.segments = _after(self.segments, segment_ids)
        if input_ids.shape[1] > self.room:
            input_ids, segment_ids = self._restart()
        hidden = self.model.features(input_ids, segment_ids, cache=self.cache)
        return self.model.logits(hidden[:, -n:])

    def expand(self, n: int) -> None:
        """Make n rows of each, next to each other."""
        if n == 1:
            return
        self.keep(torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(n))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, (n,) indices, which may repeat."""
        self.cache.keep_rows(rows)
        if self.model.config.shape is Shape.encoder_decoder:
            self.model = self.model.keep_rows(rows)
        self._select(rows)

    def reorder(self, rows: Tensor) -> None:
        """Let each row go on from another one of the same prompt, (B,) indices."""
        self.cache.reorder(rows)
        self._select(rows)

    def rewind(self, n: int) -> None:
        """Forget the last n tokens, fewer than it holds."""
        if n:
            self.cache.rewind(n)
            self.tokens = self.tokens[:, :-n]
            self.segments = None if self.segments is None else self.segments[:, :-n]

    @property
    def n_rows(self) -> int:
        """How many rows it reads at once."""
        return len(self.tokens)

    @cached_property
    def is_bound(self) -> bool:
        """Whether adapters know rows by their places."""
        adapters = (getattr(module, "adapter", None) for module in self.model.modules())
        return any(adapter is not None and adapter.rows is not None for adapter in adapters)

    def drop(self, finished: Tensor) -> None:
        """Read these of the rows it began with no more, (N,) bool, unless rows are bound."""
        if self.is_bound:
            return
        if self.numbers is None:
            self.numbers = torch.arange(self.n_rows, device=finished.device)
        going = (~finished[self.numbers]).nonzero()[:, 0]
        self.keep(going)
        self.numbers = self.numbers[going]

    def read_on(self, logits: Tensor, token: Tensor, segment: Tensor | None) -> Tensor:
        """Logits (N, V) after one more token (N,) of segment (N, 1); rows that were dropped keep those they had."""
        if self.numbers is None:
            return self.read(token[:, None], segment)
        new = self.read(token[self.numbers, None], None if segment is None else segment[self.numbers])
        return logits.index_copy(0, self.numbers, new)

    def _select(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]
        self.segments = None if self.segments is None else self.segments[rows]

    def _restart(self) -> tuple[Tensor, Tensor | None]:
        length = self.model.config.max_seq_len
        kept = max(1, length // 2)
        del self.cache  # never two caches at once
        self.tokens = self.tokens[:, -kept:]
        self.segments = None if self.segments is None else self.segments[:, -kept:]
        self.cache = self.model.new_cache(self.tokens.shape[0], length)
        return self.tokens, self.segments


class Follower:
    """A context of one row that follows a text which may change at its end."""

    def __init__(self, model: Decoder | DecoderWithSource, n_tokens: int) -> None:
        self.model, self.n_tokens = model, n_tokens
        self.device = model.embed.weight.device
        self.context = Context(model, 1, n_tokens)
        self.text: list[int] = []

    def room(self, text: list[int]) -> int:
        """How many tokens after the text could be read with it without a restart."""
        if self._kept(text, 1):
            return max(0, self.context.room + len(self.text) - len(text))
        return max(0, min(self.n_tokens, self.model.config.max_seq_len) - len(text))

    def read(self, text: list[int], n: int) -> Tensor:
        """Logits (n, V) of what follows each of the last n tokens of the text, of which there must be room for n - 1."""
        kept = self._kept(text, n)
        if kept:
            self.context.rewind(len(self.text) - kept)
        elif self.text:
            self.context = Context(self.model, 1, self.n_tokens)
        self.text = list(text)
        return self.context.read_last(torch.tensor([text[kept:]], device=self.device), n)[0]

    def _kept(self, text: list[int], n: int) -> int:
        """How many of the tokens that it has read serve for all but the last n of the text; a restart may have dropped them."""
        kept = min(common_length(self.text, text), len(text) - n)
        return kept if len(self.text) - kept < self.context.n_tokens else 0


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_prompt(model: Decoder | DecoderWithSource, input_ids: Tensor, segment_ids: Tensor | None) -> None:
    """ConfigError for a prompt (B, T) that is empty or longer than the model reads."""
    n_tokens, limit = input_ids.shape[1], model.config.max_seq_len
    if n_tokens == 0:
        raise ConfigError("the prompt is empty: give at least one token")
    if n_tokens > limit:
        raise ConfigError(
            f"the prompt has {n_tokens} tokens, the model reads at most {limit} (model.max_seq_len): shorten the prompt"
        )
    if segment_ids is not None and not segment_ids[:, -1].all():
        raise ValueError("prompts must be padded on the left: segment_ids ends in 0")


def _after(past: Tensor | None, new: Tensor) -> Tensor:
    return new if past is None else torch.cat([past, new], dim=1)
