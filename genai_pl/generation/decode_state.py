"""Decode state: the tokens of a batch together with their KV cache, one forward pass at a time."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from genai_pl.config.enums import Shape
from genai_pl.errors import ConfigError
from genai_pl.generation.captured_step import CapturedSteps
from genai_pl.models import Decoder, DecoderWithSource
from genai_pl.peft.adapter import RowWeights


class DecodeState:
    """The tokens of a batch of B rows and the KV cache of all of them, which holds at most max_seq_len tokens.

    When the cache is full, a new one is prefilled with the last half of the text, as if nothing had preceded it: positions start
    at 0 again, and no token ever attends to more than max_seq_len others. Dropping the oldest token at each step instead would
    keep keys and values that were computed from tokens no longer there, and ask learned positions for more than they have.

    model: a decoder, or a decoder with an encoded source. cache: the model's own kind of KV cache; only this class advances it.
    tokens: (B, n) ids since the last restart. segments: (B, n) their segment ids, or None where no call gave any.
    row_weights: weights of adapters for each row, or None where all rows are alike; selected together with the cache.
    row_ids: (n_rows,) numbers of the rows that are still decoded, as the caller counts them; None while all are.
    steps: graphs of single steps, on a GPU; None: all steps are eager.
    """

    def __init__(
        self,
        model: Decoder | DecoderWithSource,
        batch_size: int,
        n_tokens: int,
        row_weights: RowWeights | None = None,
        steps: CapturedSteps | None = None,
    ) -> None:
        """An empty state for `batch_size` prompts that will hold `n_tokens` tokens, prompt included."""
        self.model, self.row_weights, self.steps = model, row_weights, steps
        with self._row_weights_applied():
            self.cache = model.new_cache(batch_size, min(n_tokens, model.config.max_seq_len))
        self.tokens: Tensor | None = None
        self.segments: Tensor | None = None
        self.row_ids: Tensor | None = None

    @property
    def remaining(self) -> int:
        """Number of tokens that still fit into the cache before a restart."""
        return self.cache.max_length - self.cache.length

    @property
    def n_tokens(self) -> int:
        """Number of tokens in each row, from the last restart on."""
        return 0 if self.tokens is None else self.tokens.shape[1]

    def forward(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Logits (B, V) after the last of the new tokens (B, T), which follow the tokens of all earlier calls.

        The first call is the prefill (T is the prompt length); the following calls decode (T is 1).
        """
        return self.forward_last(input_ids, 1, segment_ids)[:, 0]

    def forward_last(self, input_ids: Tensor, n: int, segment_ids: Tensor | None = None) -> Tensor:
        """Logits (B, n, V) after each of the last n of the new tokens (B, T); a restart may leave fewer than n."""
        self.tokens = _after(self.tokens, input_ids)
        if segment_ids is not None:
            self.segments = _after(self.segments, segment_ids)
        if input_ids.shape[1] > self.remaining:
            input_ids, segment_ids = self._restart()
        if self.steps is not None and self.row_weights is None and n == 1:
            logits = self.steps.step(self.model, self.cache, input_ids, segment_ids)
            if logits is not None:
                return logits[:, None]
        # logits at the last n positions alone: for all tokens of a prefill they would be the largest tensor
        with self._row_weights_applied():
            hidden = self.model.features(input_ids, segment_ids, cache=self.cache)
            return self.model.logits(hidden[:, -n:])

    def expand(self, n: int) -> None:
        """Repeat each row n times, the copies next to each other: one prefill serves all samples of a prompt."""
        if n == 1:
            return
        self.select_rows(torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(n))

    def select_rows(self, rows: Tensor) -> None:
        """Continue with the given rows alone: indices (n,) into the current rows, which may repeat."""
        self.cache.keep_rows(rows)
        # the encoded source has one row per sequence, and belongs to the model object
        if self.model.config.shape is Shape.encoder_decoder:
            self.model = self.model.keep_rows(rows)
        if self.row_weights is not None:
            self.row_weights = self.row_weights.select(rows)
        self._select(rows)

    def reorder(self, rows: Tensor) -> None:
        """Continue each row from the text of row `rows[i]`, (B,) indices, as beams of the same prompt do.

        Unlike `select_rows`, an encoded source and adapter weights stay in place: all beams of a prompt share them.
        """
        self.cache.reorder(rows)
        self._select(rows)

    def rewind(self, n: int) -> None:
        """Remove the last n tokens, fewer than `n_tokens`, from the text and the cache."""
        if n:
            self.cache.rewind(n)
            self.tokens = self.tokens[:, :-n]
            self.segments = None if self.segments is None else self.segments[:, :-n]

    @property
    def n_rows(self) -> int:
        """Number of rows in one forward pass: those that are not dropped yet."""
        return len(self.tokens)

    def drop_finished(self, finished: Tensor) -> None:
        """Remove finished rows from the batch, the cache and the adapter weights, so that later steps compute fewer rows.

        finished: (N,) bool over the rows as they were at first, not over those that are left.
        """
        if self.row_ids is None:
            self.row_ids = torch.arange(self.n_rows, device=finished.device)
        unfinished = (~finished[self.row_ids]).nonzero()[:, 0]
        self.select_rows(unfinished)
        self.row_ids = self.row_ids[unfinished]

    def step(self, logits: Tensor, token: Tensor, segment: Tensor | None) -> Tensor:
        """Logits (N, V) after one more token (N,) of segment (N, 1) per row, in the numbering that the rows had at first.

        Dropped rows keep the logits (N, V) of the previous step, since nobody samples from them.
        """
        if self.row_ids is None:
            return self.forward(token[:, None], segment)
        new = self.forward(token[self.row_ids, None], None if segment is None else segment[self.row_ids])
        return logits.index_copy(0, self.row_ids, new)

    def _row_weights_applied(self) -> AbstractContextManager[None]:
        """The weights of adapters by row in effect, for one call of the model."""
        return nullcontext() if self.row_weights is None else self.row_weights.applied()

    def _select(self, rows: Tensor) -> None:
        self.tokens = self.tokens[rows]
        self.segments = None if self.segments is None else self.segments[rows]

    def _restart(self) -> tuple[Tensor, Tensor | None]:
        """Replace the full cache by an empty one; returns ids and segments of the last half of the text (B, n) to prefill."""
        length = self.model.config.max_seq_len
        n_kept = max(1, length // 2)
        del self.cache  # never two caches at once
        self.tokens = self.tokens[:, -n_kept:]
        self.segments = None if self.segments is None else self.segments[:, -n_kept:]
        with self._row_weights_applied():
            self.cache = self.model.new_cache(self.tokens.shape[0], length)
        return self.tokens, self.segments


class PrefixReuseState:
    """The state of one text whose end may change between two calls: the cache of the common prefix is reused.

    Speculative decoding appends draft tokens and replaces rejected ones. The caller passes the whole text each time; this class
    compares it with the previous one, rewinds the cache to the common prefix and computes the rest. n_tokens: the longest text.
    """

    def __init__(
        self, model: Decoder | DecoderWithSource, n_tokens: int, row_weights: RowWeights | None = None
    ) -> None:
        self.model, self.n_tokens, self.row_weights = model, n_tokens, row_weights
        self.device = model.embed.weight.device
        self.state = DecodeState(model, 1, n_tokens, row_weights)
        self.text: list[int] = []

    def remaining(self, text: list[int]) -> int:
        """Number of tokens that may follow `text` without a restart of the cache."""
        if self._n_reusable(text, 1):
            return max(0, self.state.remaining + len(self.text) - len(text))
        return max(0, min(self.n_tokens, self.model.config.max_seq_len) - len(text))

    def forward(self, text: list[int], n: int) -> Tensor:
        """Logits (n, V) after each of the last n tokens of the text; `remaining` must allow for the n - 1 draft tokens."""
        n_reused = self._n_reusable(text, n)
        if n_reused:
            self.state.rewind(len(self.text) - n_reused)
        elif self.text:
            self.state = DecodeState(self.model, 1, self.n_tokens, self.row_weights)
        self.text = list(text)
        return self.state.forward_last(torch.tensor([text[n_reused:]], device=self.device), n)[0]

    def _n_reusable(self, text: list[int], n: int) -> int:
        """Number of cached tokens that are a prefix of all but the last n tokens of the text.

        At least n tokens must be computed, since logits are not cached. 0 if a restart has dropped part of that prefix.
        """
        n_reused = min(common_length(self.text, text), len(text) - n)
        return n_reused if len(self.text) - n_reused < self.state.n_tokens else 0


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two token sequences.

    >>> common_length([5, 6, 7], [5, 6, 9, 7])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def check_prompt(model: Decoder | DecoderWithSource, input_ids: Tensor, segment_ids: Tensor | None) -> None:
    """ConfigError for prompts (B, T) of no tokens or more than max_seq_len; ValueError for padding on the right."""
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
