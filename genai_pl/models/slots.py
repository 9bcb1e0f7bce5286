"""The keys and values of rows that come and go, and that have lengths of their own."""

import torch
from torch import Tensor

from genai_pl.models.cache import KVCache

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
        self.starts: list[int] = []  # the first column of each row
        self.end = 0  # the column of the next token
        self.source: dict[int, tuple[Tensor, Tensor]] = {}  # a decoder that reads another text has no slots
        self._starts: Tensor | None = None

    @property
    def n_text(self) -> int:
        """Columns that a step reads: as many as the longest row has tokens."""
        return self.end - self._first

    length = n_text

    @property
    def _first(self) -> int:
        return min(self.starts, default=self.end)

    def join(self, cache: KVCache, begin: int = 0, end: int | None = None) -> int:
        """The new row that holds what a cache of one row has read, or one document of it: tokens begin to end."""
        end = cache.length if end is None else end
        n, row = end - begin, len(self.starts)
        if row == self.slots:
            raise ValueError(f"all {self.slots} slots are taken")
        self._make_room(max(n, self.n_text), like=cache.k)
        first = self.end - n
        self.k[:, row, :, first : self.end] = cache.k[:, 0, :, begin:end]
        self.v[:, row, :, first : self.end] = cache.v[:, 0, :, begin:end]
        self._set([*self.starts, first])
        return row

    def leave(self, row: int, *, clean: bool = False) -> None:
        """Forget a row; the last row takes its number. `clean` also wipes what it held: a NaN is no padding."""
        last = len(self.starts) - 1
        if clean:
            self.k[:, row], self.v[:, row] = 0, 0
        starts = list(self.starts)
        if row != last:
            columns = slice(starts[last], self.end)
            self.k[:, row, :, columns] = self.k[:, last, :, columns]
            self.v[:, row, :, columns] = self.v[:, last, :, columns]
            starts[row] = starts[last]
        self._set(starts[:last])

    def clear(self) -> None:
        """Forget all rows and what they held."""
        self.k = self.v = None
        self.end = 0
        self._set([])

    def reserve(self) -> None:
        """Make room for a token of every row."""
        if self.end == self.k.shape[3]:
            self._make_room(self.n_text, like=self.k)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, D) of the past and of the new token (B, K, 1, D), which are stored."""
        B, first = len(self.starts), self._first
        self.k[layer, :B, :, self.end : self.end + 1] = k
        self.v[layer, :B, :, self.end : self.end + 1] = v
        return self.k[layer, :B, :, first : self.end + 1], self.v[layer, :B, :, first : self.end + 1]

    def segments(self, new: Tensor | None, n_new: int) -> Tensor | None:
        """1 where a row has a token, (B, S) with the new ones; None where all rows are equally long."""
        if len(set(self.starts)) == 1:
            return None
        columns = torch.arange(self._first, self.end + n_new, device=self._starts.device)
        return (columns >= self._starts).long()

    def advance(self, n_new: int, n_virtual: int = 0) -> None:
        """Count the new token of each row as past, once every layer has stored it."""
        self.end += n_new

    def _set(self, starts: list[int]) -> None:
        self.starts = starts
        self._starts = None if self.k is None else torch.tensor(starts, device=self.k.device)[:, None]  # (B, 1)

    def _make_room(self, n: int, *, like: Tensor) -> None:
        """Have n columns before the end, and one behind it."""
        columns = 0 if self.k is None else self.k.shape[3]
        if self.starts and n <= self.end < columns:
            return
        moved, first = n - self.end, self._first
        if columns < n + SPARE:
            columns = max(columns * 3 // 2, n + SPARE)
        self.k, self.v = (self._moved(old, first, moved, columns, like) for old in (self.k, self.v))
        self.end = n
        self._set([start + moved for start in self.starts])

    def _moved(self, old: Tensor | None, first: int, moved: int, columns: int, like: Tensor) -> Tensor:
        """The buffer with the columns from `first` on moved to the right, or a greater one with them."""
        B, filled = len(self.starts), slice(first + moved, self.end + moved)
        if old is None or old.shape[3] != columns:
            L, _, K, _, D = like.shape
            new = torch.zeros(L, self.slots, K, columns, D, dtype=like.dtype, device=like.device)
            if old is not None:
                new[:, :B, :, filled] = old[:, :B, :, first : self.end]
            return new
        for layer in old:  # one at a time: a copy of all would be as great as the buffer
            layer[:B, :, filled] = layer[:B, :, first : self.end].clone()
        return old
