"""Prefix cache: keys and values of texts that were decoded, for later prompts that continue them.

The turns of an episode are prompts that grow: what the policy read and wrote in one turn begins its next prompt. Rows of a
batch differ in how much they have in common with what is cached and in how much is new, and a forward pass reads a
rectangle. So the prompts stand right-aligned, the cached tokens before a common column, and every row reads as many tokens
as the row with most new ones:

    row 0    . . a a a a a | a a b b       2 tokens of row 0 are read again
    row 1    c c c c c c c | d d d d
             cached          read now
"""

import torch
from torch import Tensor

from genai_pl.config.enums import AttentionKind
from genai_pl.generation.decode_state import DecodeState, common_length
from genai_pl.models.kv_cache import KVCache


class PrefixCache:
    """Keys and values (L, K, n, D) of the tokens of each row of the last batch.

    rows: (tokens, keys, values) by number of the row; None where nothing is kept.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[list[int], Tensor, Tensor] | None] = []

    def select(self, rows: list[int]) -> None:
        """Keep these rows alone, in this order: those that the next prompts continue."""
        self.rows = [self.rows[n] for n in rows] if self.rows else []

    def prefill(self, state: DecodeState, input_ids: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Logits (B, V) after prompts (B, T), of which what the rows have in common with the cached ones is not read."""
        entries, self.rows = self.rows, []
        B, T = input_ids.shape
        lengths = [T] * B if segment_ids is None else (segment_ids > 0).sum(1).tolist()
        texts = [row[T - n :] for row, n in zip(input_ids.tolist(), lengths, strict=True)]
        if len(entries) != B or not supports_reuse(state):
            return state.forward(input_ids, segment_ids)
        reused = [
            0 if entry is None else common_length(entry[0], text) for entry, text in zip(entries, texts, strict=True)
        ]
        # one token at least is read, since logits are not cached
        n_read = max(1, *(len(text) - n for text, n in zip(texts, reused, strict=True)))
        n_cached = T - n_read
        if n_cached == 0:
            return state.forward(input_ids, segment_ids)
        # copy what is before the common column, then read the rest
        for row, (entry, length) in enumerate(zip(entries, lengths, strict=True)):
            n = length - n_read
            if n > 0:
                _, k, v = entry
                state.cache.k[:, row, :, n_cached - n : n_cached] = k[:, :, :n]
                state.cache.v[:, row, :, n_cached - n : n_cached] = v[:, :, :n]
        before = None if segment_ids is None else segment_ids[:, :n_cached]
        state.cache.segments(before, n_cached)
        state.cache.advance(n_cached)
        state.tokens, state.segments = input_ids[:, :n_cached], before
        return state.forward(input_ids[:, n_cached:], None if segment_ids is None else segment_ids[:, n_cached:])

    def keep(self, state: DecodeState, rows: Tensor, n: int) -> None:
        """Keep rows of a state, by their numbers in a batch of n; each is a copy, as the state goes on."""
        self.rows = self.rows or [None] * n
        if not supports_reuse(state):
            return
        places = torch.arange(n) if state.row_ids is None else state.row_ids.cpu()
        place_of = {number: place for place, number in enumerate(places.tolist())}
        for number in rows.tolist():
            place = place_of[number]
            is_text = torch.ones_like(state.tokens[place]) if state.segments is None else state.segments[place] > 0
            first = len(is_text) - int(is_text.sum())
            cached = slice(first, state.cache.length)
            k, v = (buffer[:, place, :, cached].clone() for buffer in (state.cache.k, state.cache.v))
            self.rows[number] = (state.tokens[place, first : state.cache.length].tolist(), k, v)


def supports_reuse(state: DecodeState) -> bool:
    """Whether the keys and values of a state can move to other columns: those of whole attention without virtual tokens."""
    config = state.model.config
    return type(state.cache) is KVCache and not state.cache.n_virtual and config.attention_kind is AttentionKind.full
