"""One vector per text."""

import torch
from torch import Tensor

from genai_pl.errors import ConfigError

POOLINGS = ("mean", "last", "cls")


def pool(hidden: Tensor, segment_ids: Tensor, kind: str) -> Tensor:
    """Embeddings (B, C) of texts padded on the right: the mean of hidden states (B, T, C), the last or the first one."""
    if kind not in POOLINGS:
        raise ConfigError(f"objective.pooling={kind} is not one of {', '.join(POOLINGS)}")
    if kind == "cls":
        return hidden[:, 0]
    real = segment_ids > 0  # (B, T)
    if kind == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), real.sum(1) - 1]
    weights = real[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
