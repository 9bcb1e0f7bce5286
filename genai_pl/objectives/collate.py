"""Collation: examples of unequal length become tensors, and each example has a random generator of its own."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genai_pl.errors import ConfigError

Example = dict[str, np.ndarray]  # token ids and masks by name, (n,) each, and key, (epoch, index)
Batch = dict[str, Tensor]


class Collator:
    """The base of collators: what packing needs to know of one.

    overlap: tokens that a row shares with the next one; 1 where the last token of a row is only predicted.
    """

    overlap: int = 0

    def row_length(self, seq_len: int) -> int:
        """The tokens of a row from which the model reads seq_len."""
        return seq_len + self.overlap


def row_rng(seed: int, row: Example) -> np.random.Generator:
    """The random generator of an example, seeded by its key: the same in every worker, batch, rank and resumed run.

    >>> [row_rng(0, {"key": (1, 5)}).integers(100).item() for _ in range(2)]
    [82, 82]
    """
    return np.random.default_rng([seed, *row["key"]])


def pad_rows(rows: Sequence[np.ndarray], fill: int, *, length: int = 0) -> Tensor:
    """The rows as one tensor (B, T), padded on the right with `fill`; T is the longest row or `length`, if that is more.

    >>> pad_rows([np.array([1, 2]), np.array([3])], 0).tolist()
    [[1, 2], [3, 0]]
    """
    length = max(length, *(len(row) for row in rows))
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def with_segments(batch: Batch, segments: Tensor) -> Batch:
    """The batch, with segment_ids only if a row has padding or two documents: attention without a mask costs less."""
    return batch if bool((segments == 1).all()) else {**batch, "segment_ids": segments}


def missing_token_error(objective: str, token: str) -> ConfigError:
    """The error for a tokenizer that lacks a token of the objective."""
    return ConfigError(
        f"objective={objective} needs {token}, which the tokenizer lacks; choose one that has it, "
        f"for example tokenizer=pretrained tokenizer.name=FOLDER"
    )
