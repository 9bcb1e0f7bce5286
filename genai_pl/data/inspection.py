"""Inspection: rows as they are tokenized, with what is learned, what is given and what is cut, and their counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

GIVEN, LEARNED, CUT = 0, 1, 2  # what becomes of a token


class Part(NamedTuple):
    """A labelled sequence of tokens of a row: token ids (n,), and for each GIVEN, LEARNED or CUT, (n,)."""

    label: str
    ids: np.ndarray
    states: np.ndarray


class InspectedRow(NamedTuple):
    """A row: its number in the source, counted from 1 (0 where it has none), and its parts.

    is_empty: whether nothing is learned from it. note: a line about it, such as its label.
    """

    number: int
    parts: list[Part]
    is_empty: bool = False
    note: str = ""

    @property
    def length(self) -> int:
        """Tokens of the row before anything is cut: of its prompt with the longest of its other parts."""
        prompt = sum(len(part.ids) for part in self.parts if part.label == "prompt")
        return prompt + max((len(part.ids) for part in self.parts if part.label != "prompt"), default=0)

    @property
    def is_cut(self) -> bool:
        return any((part.states == CUT).any() for part in self.parts)


@dataclass
class Counts:
    """What was counted over all rows: lengths in tokens, rows that are cut, empty or duplicated, tokens by their state."""

    lengths: list[int] = field(default_factory=list)
    cut: int = 0
    empty: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    first_cut: int = 0
    first_empty: int = 0

    def add(self, row: InspectedRow) -> None:
        """Count a row."""
        self.lengths.append(row.length)
        if row.is_cut:
            self.cut, self.first_cut = self.cut + 1, min(self.first_cut or row.number, row.number)
        if row.is_empty:
            self.empty, self.first_empty = self.empty + 1, min(self.first_empty or row.number, row.number)
        for part in row.parts:
            self.tokens += np.bincount(part.states, minlength=3)


def runs_of(states: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(state, start, stop) of each run of equal states.

    >>> list(runs_of(np.array([0, 0, 1])))
    [(0, 0, 2), (1, 2, 3)]
    """
    borders: Sequence[int] = [0, *(np.flatnonzero(np.diff(states)) + 1), len(states)]
    for start, stop in pairwise(borders):
        if start < stop:
            yield int(states[start]), int(start), int(stop)


def states_of(ids: np.ndarray, kept: np.ndarray, state: int) -> np.ndarray:
    """`state` for the tokens of a text (n,) that are `kept` (k,) when it is truncated, CUT for the others, (n,).

    Truncation takes tokens away in front of special ones: at the end of a text, or of both texts of a pair.

    >>> states_of(np.array([5, 6, 7, 1, 8, 9, 2]), np.array([5, 6, 1, 8, 2]), LEARNED).tolist()
    [1, 1, 2, 1, 1, 2, 1]
    """
    states = np.full(len(ids), CUT)
    n, k = len(ids), len(kept)
    # what both begin with, what both end with, and between them the rest in one piece
    begin = _equal(ids, kept)
    states[:begin] = state
    end = min(_equal(ids[::-1], kept[::-1]), k - begin)
    states[n - end :] = state  # nothing where end is 0
    if (rest := kept[begin : k - end]).size:
        starts = range(begin, n - end - len(rest) + 1)
        start = next(at for at in starts if np.array_equal(ids[at : at + len(rest)], rest))
        states[start : start + len(rest)] = state
    return states


def _equal(a: np.ndarray, b: np.ndarray) -> int:
    """The number of values that both begin with."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size
