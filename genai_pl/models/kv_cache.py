"""The keys and values of the past, in buffers of fixed size."""

import torch
from torch import Tensor

from genai_pl.config.model import ModelConfig


class KVCache:
    """Keys and values of every layer for up to `max_length` tokens; the model advances it, the caller passes it."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        size = (config.n_decoder_layer or config.n_layer, batch_size, config.n_kv_head, max_length, config.head_dim)
        self.k = torch.zeros(size, device=device, dtype=dtype)
        self.v = torch.zeros(size, device=device, dtype=dtype)
        self.length = 0
        self.n_virtual = 0  # of them, in front, tokens that are no text
        self.max_length = max_length
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, of the text that a decoder reads beside its own
        self._segments: Tensor | None = None

    @property
    def n_text(self) -> int:
        """Tokens of the text that it holds."""
        return self.length - self.n_virtual

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of the past and of the T new tokens, which are stored."""
        end = self._next_length(k.shape[2])
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def segments(self, new: Tensor | None, n_new: int) -> Tensor | None:
        """Segment ids (B, S) of the past and of the new text, or None as long as no call has given any.

        New tokens without ids belong to the document that each row ended in.
        """
        if new is None and self._segments is None:
            return None
        if self._segments is None:
            size = (self.k.shape[1], self.max_length)
            self._segments = torch.ones(size, device=self.k.device, dtype=torch.long)
        self._next_length(n_new)
        start, end = self.n_text, self.n_text + n_new
        last = self._segments[:, start - 1 : start]  # (B, 1)
        self._segments[:, start:end] = last if new is None else new
        return self._segments[:, :end]

    def advance(self, n_new: int, n_virtual: int = 0) -> None:
        """Count the new tokens, and virtual ones before them, as past, once every layer has stored them."""
        self.length += n_virtual + n_new
        self.n_virtual += n_virtual

    def keep_rows(self, rows: Tensor) -> None:
        """Reorder or drop rows of the batch, (B',) indices."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.source = {layer: (k[rows], v[rows]) for layer, (k, v) in self.source.items()}
        if self._segments is not None:
            self._segments = self._segments[rows]

    def reorder(self, rows: Tensor) -> None:
        """Let each row go on from another one that reads the same source, (B,) indices; no memory is added."""
        end = self.length
        self.k[:, :, :, :end] = self.k[:, rows, :, :end]
        self.v[:, :, :, :end] = self.v[:, rows, :, :end]
        if self._segments is not None:
            self._segments = self._segments[rows]

    def rewind(self, n: int) -> None:
        """Forget the last n tokens; fewer than it has of text."""
        self.length -= n

    def _next_length(self, n_new: int) -> int:
        if self.length + n_new > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens, {self.length + n_new} were given")
        return self.length + n_new


SPARE = 256  # columns, so that rows rarely have to be moved


class SlotCache:
    """A cache of up to `slots` rows in which all rows end in the same column, wherever each begins.

    So a step writes one column, what lies left of a row's beginning has segment 0, and distances in the row are distances
    in the cache: the model reads it as it reads prompts that are padded on the left. Rows 0 .. B-1 are in use. Buffers
    grow with the longest row; all rows move to the left when the last column is reached.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.k: Tensor | None = None  # (L, slots, K, columns, D)
        self.v: Tensor | None = None
        self.first_columns: list[int] = []  # the first column of each row
        self.next_column = 0  # the column of the next token
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # a decoder that reads another text has no slots
        self._first_columns: Tensor | None = None

    @property
    def n_text(self) -> int:
        """Columns that a step reads: as many as the longest row has tokens."""
        return self.next_column - self._leftmost

    length = n_text

    @property
    def _leftmost(self) -> int:
        return min(self.first_columns, default=self.next_column)

    def add_sequence(self, cache: KVCache, begin: int = 0, end: int | None = None) -> int:
        """The new row that holds what a cache of one row has read, or one document of it: tokens begin to end."""
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
        """Forget a row; the last row takes its number. `clean` also wipes what it held: a NaN is no padding."""
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
        """Forget all rows and what they held."""
        self.k = self.v = None
        self.next_column = 0
        self._set_first_columns([])

    def ensure_capacity(self) -> None:
        """Make room for a token of every row."""
        if self.next_column == self.k.shape[3]:
            self._grow_or_shift(self.n_text, like=self.k)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of the past and of the new token (B, K, 1, D), which are stored."""
        B, first = len(self.first_columns), self._leftmost
        self.k[layer, :B, :, self.next_column : self.next_column + 1] = k
        self.v[layer, :B, :, self.next_column : self.next_column + 1] = v
        return self.k[layer, :B, :, first : self.next_column + 1], self.v[layer, :B, :, first : self.next_column + 1]

    def segments(self, new: Tensor | None, n_new: int) -> Tensor | None:
        """1 where a row has a token, (B, S) with the new ones; None where all rows are equally long."""
        if len(set(self.first_columns)) == 1:
            return None
        columns = torch.arange(self._leftmost, self.next_column + n_new, device=self._first_columns.device)
        return (columns >= self._first_columns).long()

    def advance(self, n_new: int, n_virtual: int = 0) -> None:
        """Count the new token of each row as past, once every layer has stored it."""
        self.next_column += n_new

    def _set_first_columns(self, first_columns: list[int]) -> None:
        self.first_columns = first_columns
        self._first_columns = (
            None if self.k is None else torch.tensor(first_columns, device=self.k.device)[:, None]
        )  # (B, 1)

    def _grow_or_shift(self, n: int, *, like: Tensor) -> None:
        """Have n columns before the end, and one behind it."""
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
        """The buffer with the columns from `first` on moved to the right, or a greater one with them."""
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


class WrappedCache:
    """A cache of transformers that grows, with the segments of what it holds."""

    def __init__(self, max_length: int) -> None:
        from transformers import DynamicCache

        self.inner = DynamicCache()  # without the configuration: it keeps all keys, and the mask hides old ones
        self.max_length, self.length = max_length, 0
        self._segments: Tensor | None = None

    def segments(self, new: Tensor | None, B: int, T: int, device: torch.device) -> Tensor | None:
        """Segment ids (B, S) of the past and of the new tokens, or None as long as none were given."""
        if new is None and self._segments is None:
            return None
        if self._segments is None:
            self._segments = torch.ones(B, self.length, dtype=torch.long, device=device)
        new = self._segments[:, -1:].expand(B, T) if new is None else new
        self._segments = torch.cat([self._segments, new], dim=1)
        return self._segments

    def keep_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop rows of the batch, (B',) indices."""
        self.inner.batch_select_indices(rows)
        self._segments = None if self._segments is None else self._segments[rows]

    def reorder(self, rows: Tensor) -> None:
        """Let each row go on from another one, (B,) indices."""
        self.keep_rows(rows)

    def rewind(self, n: int) -> None:
        """Forget the last n tokens."""
        self.length -= n
        self.inner.crop(-n)
        self._segments = None if self._segments is None else self._segments[:, : self.length]
