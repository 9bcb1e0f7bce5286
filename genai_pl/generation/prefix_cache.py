"""Prefix cache: keys and values of texts that were decoded, for later prompts that continue them.

`PrefixBlocks` keeps blocks of tokens, for all requests of a server. `PrefixCache` keeps the rows of one batch for its next
turn: episodes of a policy, the chat of generate.py. What was read and written in one turn begins the next prompt. Rows of a
batch differ in how much they have in common with what is cached and in how much is new, and a forward pass reads a
rectangle. So the prompts stand right-aligned, the cached tokens before a common column, and every row reads as many tokens
as the row with most new ones:

    row 0    . . a a a a a | a a b b       2 tokens of row 0 are read again
    row 1    c c c c c c c | d d d d
             cached          read now
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count

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


class PrefixBlocks:
    """Keys and values of blocks of tokens, each known by all tokens up to its end, least recently used ones evicted first.

    max_bytes: of keys and values. block_size: tokens of a block.

    A block's key is (number of the block before it, its tokens), and the first of a text has a root instead: what else the
    keys and values depend on, such as the adapter. Numbers are never used again, so the keys spell whole texts and no hash is
    trusted. Blocks are never changed: `restore` copies them, and a text that goes on otherwise gets blocks of its own.

    They live in one tensor (P, 2, L, K, block_size, D), allocated with the first block; an operating system that allocates
    pages when they are written charges a CPU for used ones alone. Touching a text makes its beginning the most recent block,
    so a block is never evicted before those that follow it.

    n_bytes: in use.
    """

    def __init__(self, max_bytes: float, *, block_size: int = 16) -> None:
        self.max_bytes, self.block_size = max_bytes, block_size
        self.pool: Tensor | None = None
        self.places: OrderedDict[tuple[int | str, tuple[int, ...]], tuple[int, int]] = OrderedDict()  # number, place
        self.freed: list[int] = []  # places of blocks that were forgotten
        self.numbers = count()

    @property
    def n_bytes(self) -> int:
        """Bytes of the blocks that are kept."""
        return 0 if self.pool is None else len(self.places) * self.pool[0].nbytes

    def n_cached(self, root: str, tokens: Sequence[int]) -> int:
        """Number of the tokens, from the first on, whose keys and values are kept; less than all, as logits are not."""
        return len(self._found(root, tokens, (len(tokens) - 1) // self.block_size)) * self.block_size

    def restore(self, root: str, tokens: Sequence[int], cache: KVCache) -> int:
        """Copy what is kept of the tokens behind those that a cache of one row has read; returns how many were added."""
        begin = cache.length
        found = self._found(root, tokens, (len(tokens) - 1) // self.block_size)
        end = len(found) * self.block_size
        if end <= begin:
            return 0
        self._touch(found)
        places = torch.tensor([self.places[key][1] for key in found[begin // self.block_size :]])
        blocks = self.pool[places.to(self.pool.device)]  # (n, 2, L, K, block_size, D)
        kv = blocks.permute(1, 2, 3, 0, 4, 5).flatten(3, 4)[:, :, :, begin % self.block_size :]
        cache.k[:, 0, :, begin:end], cache.v[:, 0, :, begin:end] = kv
        cache.advance(end - begin)
        return end - begin

    def store(self, root: str, tokens: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Keep the whole blocks of tokens with their keys and values (L, K, n, D); n may be more than there are tokens."""
        n_blocks, size = len(tokens) // self.block_size, self.block_size
        n_blocks = min(n_blocks, self._n_places(k))  # more would evict the text's own beginning
        found = self._found(root, tokens, n_blocks)
        self._touch(found)  # before eviction, so that what this text continues stays
        for n in range(len(found), n_blocks):
            columns = slice(n * size, (n + 1) * size)
            key = (self.places[found[-1]][0] if found else root, tuple(tokens[columns]))
            place = self._free_place()
            self.pool[place, 0], self.pool[place, 1] = k[:, :, columns], v[:, :, columns]
            self.places[key] = next(self.numbers), place
            found.append(key)
        self._touch(found)

    def forget(self, root: str) -> None:
        """Drop all blocks of the texts with this root."""
        dropped: set[int | str] = {root}
        # a block may have been used before the one that it follows, so look until nothing follows any more
        while followers := [key for key in self.places if key[0] in dropped]:
            for key in followers:
                number, place = self.places.pop(key)
                dropped.add(number)
                self.freed.append(place)

    def _found(self, root: str, tokens: Sequence[int], n_blocks: int) -> list[tuple[int | str, tuple[int, ...]]]:
        """Keys of the first n_blocks of a text, up to the first that is not kept."""
        keys, before, size = [], root, self.block_size
        for n in range(n_blocks):
            key = (before, tuple(tokens[n * size : (n + 1) * size]))
            if key not in self.places:
                break
            keys.append(key)
            before = self.places[key][0]
        return keys

    def _touch(self, keys: list[tuple[int | str, tuple[int, ...]]]) -> None:
        for key in reversed(keys):
            self.places.move_to_end(key)

    def _n_places(self, k: Tensor) -> int:
        """Blocks of such keys (L, K, n, D) that fit; the pool is allocated for them by the first call."""
        if self.pool is None:
            L, K, _, D = k.shape
            n = int(self.max_bytes // (2 * L * K * self.block_size * D * k.element_size()))
            self.pool = torch.empty(n, 2, L, K, self.block_size, D, dtype=k.dtype, device=k.device)
        return len(self.pool)

    def _free_place(self) -> int:
        """A place that no block has: one that was freed or never used, else that of the block unused for longest."""
        if self.freed:
            return self.freed.pop()
        if len(self.places) < len(self.pool):
            return len(self.places)
        return self.places.popitem(last=False)[1][1]


def supports_reuse(state: DecodeState) -> bool:
    """Whether the keys and values of a state can move to other columns: those of whole attention without virtual tokens."""
    config = state.model.config
    return type(state.cache) is KVCache and not state.cache.n_virtual and config.attention_kind is AttentionKind.full
