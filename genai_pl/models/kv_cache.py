"""KV caches: the keys and values of the past, so that a decoding step computes those of one token only.

Two caches with one interface (`update` or `past`, `segments`, `advance`, and what decoding needs to reorder and rewind):
`KVCache` for rows that are decoded together from their prompts on, and `SlotCache` for the rows of a serving engine, which
come and go (`hf/transformers_cache.py` wraps those of transformers). A cache is an argument of a forward pass and never a
part of the model: the model writes it, the caller owns it.
"""

import torch
from torch import Tensor

from genai_pl.config.model import ModelConfig
from genai_pl.kernels.decode_step import Past


class KVCache:
    """Keys and values of every layer for up to `max_length` tokens of B rows, in buffers (L, B, K, max_length, D).

    config: layers, key heads and head size. batch_size: B. max_length: tokens a row can hold, virtual ones included.
    device, dtype: those of the model's keys and values.

    The protocol of one pass: `segments` once, `update` once per layer, `advance` once. The buffers are written before
    `length` moves, so that every layer of a pass writes the same columns.

    >>> config = ModelConfig(vocab_size=9, n_layer=1, n_head=2, n_embd=8)
    >>> cache = KVCache(config, 1, 4, device=torch.device("cpu"), dtype=torch.float32)
    >>> k, v = cache.update(0, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> cache.advance(3); k.shape, cache.length
    (torch.Size([1, 2, 3, 4]), 3)
    """

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        size = (config.n_decoder_layer or config.n_layer, batch_size, config.n_kv_head, max_length, config.head_dim)
        self.k = torch.zeros(size, device=device, dtype=dtype)
        self.v = torch.zeros(size, device=device, dtype=dtype)
        self.length = 0  # tokens that the buffers hold
        self.n_virtual = 0  # of them, at the beginning, virtual ones
        self.max_length = max_length
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys and values of an encoder's output
        self._segments: Tensor | None = None

    @property
    def n_text(self) -> int:
        """Tokens of text that the cache holds, virtual ones left out."""
        return self.length - self.n_virtual

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of the past and of the T new tokens (B, K, T, D), which are stored.

        The results are views of the buffers: attention reads the past without a copy.
        """
        end = self._next_length(k.shape[2])
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def past(self, segments: Tensor | None) -> Past:
        """What a compiled step of one token reads and writes instead of `update`, for the result of `segments`."""
        self._next_length(1)
        first = torch.zeros(self.k.shape[1], dtype=torch.long, device=self.k.device)
        if segments is not None:  # tokens of a document are next to each other
            first = (segments != segments[:, -1:]).sum(dim=1)
        return Past(self.k, self.v, first, self.length)

    def segments(self, new: Tensor | None, n_new: int) -> Tensor | None:
        """Segment ids (B, S) of the past and of the n_new tokens, or None as long as no call has given any.

        new: (B, n_new), or None for tokens of the document that each row ended in. Without padding or packing no ids are
        kept at all, and masks stay rules without tensors.
        """
        if new is None and self._segments is None:
            return None
        if self._segments is None:  # all earlier tokens were of document 1
            size = (self.k.shape[1], self.max_length)
            self._segments = torch.ones(size, device=self.k.device, dtype=torch.long)
        self._next_length(n_new)
        start, end = self.n_text, self.n_text + n_new
        last = self._segments[:, start - 1 : start]  # (B, 1)
        self._segments[:, start:end] = last if new is None else new
        return self._segments[:, :end]

    def advance(self, n_new: int, n_virtual: int = 0) -> None:
        """Count n_new tokens, and n_virtual ones before them, as past; every layer has stored them."""
        self.length += n_virtual + n_new
        self.n_virtual += n_virtual

    def keep_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop rows of the batch: row i of the result was row rows[i], (B',) indices."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.source = {layer: (k[rows], v[rows]) for layer, (k, v) in self.source.items()}
        if self._segments is not None:
            self._segments = self._segments[rows]

    def reorder(self, rows: Tensor) -> None:
        """Let each row continue another row that reads the same source, (B,) indices, as beam search does; no memory is added.

        Only the filled columns are copied, in place: `keep_rows` would allocate the buffers anew at every step.
        """
        end = self.length
        self.k[:, :, :, :end] = self.k[:, rows, :, :end]
        self.v[:, :, :, :end] = self.v[:, rows, :, :end]
        if self._segments is not None:
            self._segments = self._segments[rows]

    def rewind(self, n: int) -> None:
        """Forget the last n tokens, fewer than the text has; what the buffers hold there is written over."""
        self.length -= n

    def _next_length(self, n_new: int) -> int:
        """The length after n_new more tokens; ValueError if the buffers do not hold it."""
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {self.length + n_new} were given")
        return self.length + n_new


SPARE = 256  # columns beyond the longest row: all rows are shifted once in as many steps


class SlotCache:
    """KV cache for up to `slots` sequences that all end in the same column, each with left padding up to its beginning.

    One decoding step of all sequences so writes a single column, whatever their lengths: attention sees a rectangle
    whose padding has segment 0, as in a batch of prompts padded on the left, and distances between tokens of a sequence
    are distances between columns. Nothing is paged or gathered; the price is the padding, up to the longest sequence.

        columns      0 1 2 3 4 5 6 7 8 9
        sequence 0       a a a a a a .        first_columns[0] = 2
        sequence 1             b b b .        first_columns[1] = 5, next_column = 8

    slots: the most sequences at a time. Sequences 0 .. B-1 are in use; `remove_sequence` moves the last into the gap.
    Buffers are allocated with the first sequence, grow with the longest, and when the last column is full all sequences
    shift to the left. Invariant: columns before a sequence's first hold finite numbers (masked, but multiplied by 0).
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.k: Tensor | None = None  # (L, slots, K, columns, D)
        self.v: Tensor | None = None
        self.first_columns: list[int] = []  # of each sequence
        self.next_column = 0  # where the next token of every sequence goes
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # empty: encoder-decoders are not served from slots
        self._first_columns: Tensor | None = None

    @property
    def n_text(self) -> int:
        """Columns that a step reads: the tokens of the longest sequence."""
        return self.next_column - self._leftmost

    length = n_text

    @property
    def _leftmost(self) -> int:
        """The first column that any sequence uses."""
        return min(self.first_columns, default=self.next_column)

    def add_sequence(self, cache: KVCache, begin: int = 0, end: int | None = None) -> int:
        """Copy tokens begin to end of a cache of one row (a prefilled prompt) into a free slot; returns the new row.

        Sequences in use are shifted to the right first where the new one is longer than all of them. ValueError if every
        slot is taken.
        """
        end = cache.length if end is None else end
        n, row = end - begin, len(self.first_columns)
        if row == self.slots:
            raise ValueError(f"all {self.slots} slots are taken")
        self._grow_or_shift(max(n, self.n_text), like=cache.k)
        first = self.next_column - n
        self.k[:, row, :, first : self.next_column] = cache.k[:, 0, :, begin:end]
        self.v[:, row, :, first : self.next_column] = cache.v[:, 0, :, begin:end]
        self._set_first_columns([*self.first_columns, first])
        return row

    def remove_sequence(self, row: int, *, clean: bool = False) -> None:
        """Free a row, into which the last row moves. `clean` sets its numbers to 0: NaN under a mask is still NaN."""
        last = len(self.first_columns) - 1
        if clean:
            self.k[:, row], self.v[:, row] = 0, 0
        first_columns = list(self.first_columns)
        if row != last:
            columns = slice(first_columns[last], self.next_column)
            self.k[:, row, :, columns] = self.k[:, last, :, columns]
            self.v[:, row, :, columns] = self.v[:, last, :, columns]
            first_columns[row] = first_columns[last]
        self._set_first_columns(first_columns[:last])

    def clear(self) -> None:
        """Free all rows and the buffers."""
        self.k = self.v = None
        self.next_column = 0
        self._set_first_columns([])

    def ensure_capacity(self) -> None:
        """Have a free column at `next_column`, before a step: shift or grow the buffers if the last one is full."""
        if self.next_column == self.k.shape[3]:
            self._grow_or_shift(self.n_text, like=self.k)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of the past and of the new token (B, K, 1, D), which are stored in `next_column`."""
        B, first = len(self.first_columns), self._leftmost
        self.k[layer, :B, :, self.next_column : self.next_column + 1] = k
        self.v[layer, :B, :, self.next_column : self.next_column + 1] = v
        return self.k[layer, :B, :, first : self.next_column + 1], self.v[layer, :B, :, first : self.next_column + 1]

    def past(self, segments: Tensor | None) -> Past:
        """What a compiled step reads and writes instead of `update`."""
        return Past(self.k, self.v, self._first_columns.view(-1), self.next_column)

    def segments(self, new: Tensor | None, n_new: int) -> Tensor | None:
        """1 where a sequence has a token and 0 in its padding, (B, S) with the new ones; None if all are equally long."""
        if len(set(self.first_columns)) == 1:
            return None
        columns = torch.arange(self._leftmost, self.next_column + n_new, device=self._first_columns.device)
        return (columns >= self._first_columns).long()

    def advance(self, n_new: int, n_virtual: int = 0) -> None:
        """Count the new token of each sequence as past; every layer has stored it."""
        self.next_column += n_new

    def _set_first_columns(self, first_columns: list[int]) -> None:
        """Keep the first columns as numbers and, for masks, as a tensor on the device: one copy per change, not per step."""
        self.first_columns = first_columns
        self._first_columns = (
            None if self.k is None else torch.tensor(first_columns, device=self.k.device)[:, None]
        )  # (B, 1)

    def _grow_or_shift(self, n: int, *, like: Tensor) -> None:
        """Have n columns before `next_column` and a free one at it: by a shift if the buffers are large enough, else by growth.

        like: keys whose heads, size, dtype and device the buffers take. Growth is by half, so that its cost stays a
        fraction of the tokens written.
        """
        columns = 0 if self.k is None else self.k.shape[3]
        if self.first_columns and n <= self.next_column < columns:
            return
        shift, first = n - self.next_column, self._leftmost
        if columns < n + SPARE:
            columns = max(columns * 3 // 2, n + SPARE)
        self.k, self.v = (self._shifted(old, first, shift, columns, like) for old in (self.k, self.v))
        self.next_column = n
        self._set_first_columns([column + shift for column in self.first_columns])

    def _shifted(self, old: Tensor | None, first: int, shift: int, columns: int, like: Tensor) -> Tensor:
        """The buffer with the used columns, from `first` on, moved by `shift` (negative: to the left), or a greater buffer."""
        B, filled = len(self.first_columns), slice(first + shift, self.next_column + shift)
        if old is None or old.shape[3] != columns:
            L, _, K, _, D = like.shape
            new = torch.zeros(L, self.slots, K, columns, D, dtype=like.dtype, device=like.device)
            if old is not None:
                new[:, :B, :, filled] = old[:, :B, :, first : self.next_column]
            return new
        for layer in old:  # one at a time: a copy of all would be as great as the buffer
            layer[:B, :, filled] = layer[:B, :, first : self.next_column].clone()
        return old
