"""Rows of a rollout a few at a time: minibatches, and passes that are small enough for memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Experience = dict[str, Tensor]  # (R, ...) of rows, or (N, ...) of completions, N / R to a row
AS_LONG_AS_ROWS = ("input_ids", "labels", "segment_ids")


def take(experience: Experience, rows: Tensor, n: int) -> Experience:
    """What belongs to some of the n rows.

    >>> take({"row": torch.tensor([5, 6]), "completion": torch.tensor([50, 51, 60, 61])}, torch.tensor([1]), 2)
    {'row': tensor([6]), 'completion': tensor([60, 61])}
    """
    return {name: x.unflatten(0, (n, -1))[rows].flatten(0, 1) for name, x in experience.items()}


def passes(experience: Experience, size: int) -> Iterator[tuple[Tensor, Experience]]:
    """`size` rows at a time, of about the same length and without padding behind the longest, and which they are."""
    lengths = (experience["segment_ids"] > 0).sum(1)
    if size >= len(lengths):
        yield torch.arange(len(lengths), device=lengths.device), experience
        return
    for rows in lengths.argsort(stable=True).split(size):
        longest = int(lengths[rows].max())
        part = take(experience, rows, len(lengths))
        yield rows, {name: x[:, :longest] if name in AS_LONG_AS_ROWS else x for name, x in part.items()}


def put_back(rows: Sequence[Tensor], parts: Sequence[Experience]) -> Experience:
    """What was made of each pass, in the order of the rows that it was made of."""
    order = torch.cat(list(rows)).argsort()
    return take({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, order, len(order))
