"""Packing: tokenized documents, examples and pairs laid out in rows of a fixed capacity, with almost no padding.

Three layouts, by what may be divided:

- `PackedRows` and `Packer` (pretraining) concatenate all documents and split the result every `length` tokens, so no
  token is padding. The former reads a memory-mapped table by row number, the latter a stream; both give the same rows.
- `PackedExamples` (fine-tuning) and `PackedPairs` (sequence to sequence) keep every example whole and fill rows by
  `pack`, best-fit decreasing; only the end of a row is padded, by the collator.

All of them number the documents of a row in `segment_ids`, from 1 on. The attention mask reads these numbers, so tokens
attend to their own document only and packing changes no loss: it is an arrangement, not an approximation.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from genai_pl.objectives.collate import Example

if TYPE_CHECKING:
    import datasets

    from genai_pl.data.prompt_tokens import TokenizedExample


class PackedRows(Dataset):
    """Rows of `length` tokens out of all documents end to end; row r begins at token r * (length - overlap).

    documents: a table with a column `input_ids`, one document per row (`genai_pl.data.tokenize.tokenize`).
    length: tokens of a row, seq_len + overlap.
    overlap: tokens that a row shares with the next one. With 1, every token but the first is once a target of
        next-token prediction: the last token of a row is predicted in it and is the first input of the next row.
    separate: number the documents of a row in segment_ids; False gives all tokens of a row the segment 1.

    A row is sliced from the memory-mapped table when it is read: nothing is copied or written beforehand.
    """

    def __init__(self, documents: "datasets.Dataset", length: int, *, overlap: int = 1, separate: bool = True) -> None:
        self.length, self.overlap, self.separate = length, overlap, separate
        # an arrow column is a list of chunks: each has one flat array of values and the offsets of its documents in it
        column = documents.with_format("arrow")[:]["input_ids"] if len(documents) else []
        chunks = [chunk for chunk in getattr(column, "chunks", []) if len(chunk)]
        self.values = [chunk.flatten().to_numpy() for chunk in chunks]
        lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in chunks]
        # token positions in the concatenation of all documents: where chunks begin, and where documents end
        self.chunk_starts = np.cumsum([0, *(len(v) for v in self.values)])
        self.document_ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]), dtype=np.int64)
        self.n_tokens = int(self.chunk_starts[-1])

    def __len__(self) -> int:
        return max(0, self.n_tokens - self.overlap) // (self.length - self.overlap)

    def __getitem__(self, index: int) -> Example:
        start = index * (self.length - self.overlap)
        return self._row(start, start + self.length)

    def row_tokens(self) -> int:
        """Tokens of each row that the row before it has not."""
        return self.length - self.overlap

    def tail(self) -> Example | None:
        """The tokens after the last full row as a shorter row, or None: validation counts every token."""
        start = len(self) * (self.length - self.overlap)
        return None if self.n_tokens - start < 2 else self._row(start, self.n_tokens)

    def _row(self, start: int, stop: int) -> Example:
        segments = np.ones(stop - start, np.int64)
        if self.separate:
            ends = np.searchsorted(self.document_ends, np.arange(start, stop), side="right")
            segments = ends - ends[0] + 1
        return {"input_ids": self._tokens(start, stop), "segment_ids": segments}

    def _tokens(self, start: int, stop: int) -> np.ndarray:
        """Token ids (stop - start,) from the concatenation of all chunks."""
        chunk = int(np.searchsorted(self.chunk_starts, start, side="right")) - 1
        parts = []
        while start < stop:
            base = self.chunk_starts[chunk]
            part = self.values[chunk][start - base : stop - base]
            parts.append(part)
            start += len(part)
            chunk += 1
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


class Packer:
    """The rows of `PackedRows` from a stream: push documents, receive the rows that they complete.

    length, overlap, separate: as for `PackedRows`.

    The state is the incomplete row only, so a checkpoint of a stream stays small.

    >>> packer = Packer(4)
    >>> [row["input_ids"].tolist() for row in packer.push(np.arange(6))]
    [[0, 1, 2, 3]]
    >>> [row["segment_ids"].tolist() for row in packer.push(np.arange(2))]
    [[1, 1, 1, 2]]
    """

    def __init__(self, length: int, *, overlap: int = 1, separate: bool = True) -> None:
        self.length, self.overlap, self.separate = length, overlap, separate
        self.tokens = np.zeros(0, np.int32)
        self.segments = np.zeros(0, np.int64)
        self.document = 0

    def push(self, ids: np.ndarray, *, ends: bool = True) -> list[Example]:
        """The rows that the token ids (n,) complete; `ends` is False where more tokens of the same document follow."""
        self.tokens = np.concatenate([self.tokens, ids])
        self.segments = np.concatenate([self.segments, np.full(len(ids), self.document)])
        self.document += ends and self.separate
        rows, step = [], self.length - self.overlap
        while len(self.tokens) >= self.length:
            segments = self.segments[: self.length]
            rows.append({"input_ids": self.tokens[: self.length], "segment_ids": segments - segments[0] + 1})
            self.tokens, self.segments = self.tokens[step:], self.segments[step:]
        return rows

    def state_dict(self) -> dict[str, object]:
        """Tokens and segments of the incomplete row and the number of the document, for `load_state_dict`."""
        return {
            "tokens": torch.from_numpy(self.tokens.copy()),
            "segments": torch.from_numpy(self.segments.copy()),
            "document": self.document,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self.tokens, self.segments = state["tokens"].numpy(), state["segments"].numpy()
        self.document = state["document"]


class PackedExamples(Dataset):
    """Rows of whole examples whose tokens fit into `capacity` together.

    examples: token ids and loss mask of each example, at most `capacity` tokens.
    capacity: tokens of a row; 0 gives every example a row of its own.

    Rows are {"input_ids": (n,), "segment_ids": (n,), "loss_mask": (n,)}, where n is at most `capacity`.
    """

    def __init__(self, examples: list["TokenizedExample"], capacity: int) -> None:
        self.examples = examples
        lengths = [len(example.input_ids) for example in examples]
        self.bins = pack(lengths, capacity) if capacity else [[n] for n in range(len(examples))]

    def __len__(self) -> int:
        return len(self.bins)

    def row_tokens(self) -> np.ndarray:
        """Tokens of each row."""
        return np.asarray([sum(len(self.examples[n].input_ids) for n in row) for row in self.bins], np.int64)

    def __getitem__(self, index: int) -> Example:
        examples = [self.examples[n] for n in self.bins[index]]
        lengths = [len(example.input_ids) for example in examples]
        return {
            "input_ids": np.concatenate([example.input_ids for example in examples]),
            "segment_ids": np.repeat(np.arange(len(examples)) + 1, lengths),
            "loss_mask": np.concatenate([example.loss_mask for example in examples]),
        }


class PackedPairs(Dataset):
    """Rows of whole pairs of which the sources together and the targets together fit into `capacity` tokens.

    pairs: a table with columns `source` and `target` of token ids.
    capacity: tokens of a row, for the encoder and for the decoder; 0 gives every pair a row of its own.

    A pair takes the longer of its two sides from both rows. Rows are {"source", "source_segments", "target",
    "target_segments"}; segment k of the source belongs to segment k of the target.
    """

    def __init__(self, pairs: "datasets.Dataset", capacity: int) -> None:
        self.pairs = pairs
        self.lengths = [
            (len(source), len(target)) for source, target in zip(pairs["source"], pairs["target"], strict=True)
        ]
        self.bins = pack([*map(max, self.lengths)], capacity) if capacity else [[n] for n in range(len(pairs))]

    def __len__(self) -> int:
        return len(self.bins)

    def row_tokens(self) -> np.ndarray:
        """Tokens of each row, sources and targets."""
        return np.asarray([sum(sum(self.lengths[n]) for n in row) for row in self.bins], np.int64)

    def __getitem__(self, index: int) -> Example:
        pairs = [self.pairs[n] for n in self.bins[index]]
        row = {}
        for role in ("source", "target"):
            texts = [pair[role] for pair in pairs]
            row[role] = np.concatenate(texts)
            row[f"{role}_segments"] = np.repeat(np.arange(len(texts)) + 1, [len(text) for text in texts])
        return row


class KeyedExamples(Dataset):
    """The examples of another data set by (epoch, index), each with that pair as its `key`.

    Collators seed the noise of a row (`row_rng`) with the key, so noise is the same for any worker, rank and resume.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        return {**self.rows[key[1]], "key": key}


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Bins of example numbers whose lengths sum to at most `capacity`: best-fit decreasing bin packing.

    Examples are placed longest first, each into the bin that it fills best. That needs at most 11/9 of the fewest bins
    (Johnson 1974); measured on lengths of conversations, rows are 97 % full or more. Each length must be between 1 and
    `capacity`. Bins are found by binary search over the distinct remainders, of which there are at most `capacity`
    however many bins are open: a million examples take seconds.

    >>> pack([3, 5, 8, 5], 8)
    [[2], [1], [3, 0]]
    """
    lengths = np.asarray(lengths, np.int64)
    assert ((lengths >= 1) & (lengths <= capacity)).all()
    bins: list[list[int]] = []
    open_bins: defaultdict[int, list[int]] = defaultdict(list)  # numbers of bins by the tokens that remain in them
    remainders: list[int] = []  # the keys of open_bins that have bins, sorted
    order = np.argsort(-lengths, kind="stable")
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        # the bin with the smallest remainder that still holds the example, or a new one
        index = bisect_left(remainders, length)
        if index == len(remainders):
            number, remaining = len(bins), capacity - length
            bins.append([])
        else:
            number, remaining = open_bins[remainders[index]].pop(), remainders[index] - length
            if not open_bins[remainders[index]]:
                del remainders[index]
        # the bin moves to its new remainder; a full one is closed
        bins[number].append(example)
        if remaining:
            if not open_bins[remaining]:
                insort(remainders, remaining)
            open_bins[remaining].append(number)
    return bins
