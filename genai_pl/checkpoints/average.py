"""Averaged checkpoints: the mean of the weights of several checkpoints of one run (Vaswani et al. 2017, section 6.1)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from genai_pl.checkpoints.file import read_checkpoint
from genai_pl.errors import CheckpointError


def mean_weights(checkpoints: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of each weight by its name in the model, summed in float64, in the dtype of the first checkpoint.

    Integers come from the first. CheckpointError where two checkpoints are not of one model.
    """
    prefix = "model."
    first, *others = (read_checkpoint(path)["state_dict"] for path in checkpoints)
    for path, other in zip(checkpoints[1:], others, strict=True):
        if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in other.items()}:
            raise CheckpointError(f"{path}: its weights are of another model than those of {checkpoints[0]}")
    means: dict[str, Tensor] = {}
    for name, weight in first.items():
        if name.startswith(prefix) and weight.is_floating_point():
            total = sum((other[name].to(torch.float64) for other in others), weight.to(torch.float64))
            means[name.removeprefix(prefix)] = (total / len(checkpoints)).to(weight.dtype)
    return means
