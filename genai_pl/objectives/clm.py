"""Causal language modelling: predict every token from those before it."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from genai_pl.kernels import linear_cross_entropy

IGNORED = -100


def causal_lm_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """-sum_t log P(x_t | x_<t) over the targets, in nats, of hidden (B, T, C), head (V, C) and labels (B, T).

    labels[t] is what position t should predict (-100: nothing); z_loss adds z (log Z)^2 (Chowdhery et al. 2022, 5).
    """
    return linear_cross_entropy(
        hidden, head, labels, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=IGNORED
    )


class CausalLMCollator:
    """Rows of T + 1 tokens become input_ids and labels (B, T); segment_ids only where a row has padding or two documents."""

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        tokens = torch.stack([_pad(row["input_ids"], length, self.pad_token_id) for row in rows])
        segments = torch.stack([_pad(row["segment_ids"], length, 0) for row in rows])
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        labels = torch.where(same, tokens[:, 1:], IGNORED)
        batch = {"input_ids": tokens[:, :-1], "labels": labels, "targets": same.sum().float()}
        if not bool((segments[:, :-1] == 1).all()):  # a plain causal mask costs less
            batch["segment_ids"] = segments[:, :-1]
        return batch


def _pad(values: np.ndarray, length: int, fill: int) -> Tensor:
    padded = np.full(length, fill, dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
