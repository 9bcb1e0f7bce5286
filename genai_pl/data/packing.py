"""Token documents become rows of one length, without padding and without one document seeing another."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from genai_pl.objectives.collate import Example

if TYPE_CHECKING:
    import datasets


class PackedRows(Dataset):
    """Row r is `length` tokens from r * (length - overlap) on, of all documents end to end.

    With an overlap of 1, every token but the first is once a target of next-token prediction. Rows are cut out of the
    memory-mapped table when asked for; nothing is copied or written. Documents of a row are numbered, unless they are
    not to be kept `apart`.
    """

    def __init__(self, documents: "datasets.Dataset", length: int, *, overlap: int = 1, apart: bool = True) -> None:
        self.length, self.overlap, self.apart = length, overlap, apart
        column = documents.with_format("arrow")[:]["input_ids"] if len(documents) else []
        chunks = [chunk for chunk in getattr(column, "chunks", []) if len(chunk)]
        self.values = [chunk.flatten().to_numpy() for chunk in chunks]
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
        self.chunk_starts = np.cumsum([0, *(len(v) for v in self.values)])
        self.document_ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]), dtype=np.int64)
        self.n_tokens = int(self.chunk_starts[-1])

    def __len__(self) -> int:
        return max(0, self.n_tokens - self.overlap) // (self.length - self.overlap)

    def __getitem__(self, index: int) -> Example:
        start = index * (self.length - self.overlap)
        return self._row(start, start + self.length)

    def tail(self) -> Example | None:
        """What is left after the last full row, a shorter one, or None: validation counts every token."""
        start = len(self) * (self.length - self.overlap)
        return None if self.n_tokens - start < 2 else self._row(start, self.n_tokens)

    def _row(self, start: int, stop: int) -> Example:
        segments = np.ones(stop - start, np.int64)
        if self.apart:
            ends = np.searchsorted(self.document_ends, np.arange(start, stop), side="right")
            segments = ends - ends[0] + 1
        return {"input_ids": self._tokens(start, stop), "segment_ids": segments}

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        first = int(np.searchsorted(self.chunk_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            base = self.chunk_starts[first]
            part = self.values[first][start - base : stop - base]
            parts.append(part)
            start += len(part)
            first += 1
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


class Packer:
    """The same rows from a stream: push documents in, take rows out; the state is what has not filled a row yet."""

    def __init__(self, length: int, *, overlap: int = 1, apart: bool = True) -> None:
        self.length, self.overlap, self.apart = length, overlap, apart
        self.tokens = np.zeros(0, np.int32)
        self.segments = np.zeros(0, np.int64)
        self.document = 0

    def push(self, ids: np.ndarray, *, ends: bool = True) -> list[Example]:
        """Rows that the new tokens complete; `ends` says that the document is over with them."""
        self.tokens = np.concatenate([self.tokens, ids])
        self.segments = np.concatenate([self.segments, np.full(len(ids), self.document)])
        self.document += ends and self.apart
        rows, step = [], self.length - self.overlap
        while len(self.tokens) >= self.length:
            segments = self.segments[: self.length]
            rows.append({"input_ids": self.tokens[: self.length], "segment_ids": segments - segments[0] + 1})
            self.tokens, self.segments = self.tokens[step:], self.segments[step:]
        return rows

    def state_dict(self) -> dict[str, object]:
        """Plain values that `load_state_dict` takes."""
        return {
            "tokens": torch.from_numpy(self.tokens.copy()),
            "segments": torch.from_numpy(self.segments.copy()),
            "document": self.document,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        self.tokens, self.segments = state["tokens"].numpy(), state["segments"].numpy()
        self.document = state["document"]


class NumberedRows(Dataset):
    """The rows of another data set, asked for by (epoch, index) and told it as `key`: noise is drawn from it."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        return {**self.rows[key[1]], "key": key}
