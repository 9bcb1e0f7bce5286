"""What collators share: rows of unequal length become tensors, and each row has its own noise."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genai_pl.errors import ConfigError

Example = dict[str, np.ndarray]  # input_ids (n,), segment_ids (n,) and key (epoch, index)
Batch = dict[str, Tensor]


class Collator:
    """What the packer asks of a collator: how many tokens a row holds, and how many of them its neighbour holds too."""

    overlap: int = 0

    def row_length(self, seq_len: int) -> int:
        """Tokens of a row from which the model reads seq_len."""
        return seq_len + self.overlap


def row_rng(seed: int, row: Example) -> np.random.Generator:
    """The row's own randomness: the same in every worker, batch and run."""
    return np.random.default_rng([seed, *row["key"]])


def pad_rows(rows: Sequence[np.ndarray], fill: int, *, length: int = 0) -> Tensor:
    """The rows side by side, (B, T), as long as the longest one or `length`.

    >>> pad_rows([np.array([1, 2]), np.array([3])], 0).tolist()
    [[1, 2], [3, 0]]
    """
    length = max(length, *(len(row) for row in rows))
    padded = np.full((len(rows), length), fill, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def with_segments(batch: Batch, segments: Tensor) -> Batch:
    """The batch, with segment_ids only if a row has padding or two documents: without them the mask costs less."""
    return batch if bool((segments == 1).all()) else {**batch, "segment_ids": segments}


def missing_token_error(objective: str, token: str) -> ConfigError:
    """What to say to a tokenizer without a token that the objective is made of."""
    return ConfigError(
        f"objective={objective} needs {token}, which the tokenizer lacks; choose one that has it, "
        f"for example tokenizer=pretrained tokenizer.name=FOLDER"
    )
