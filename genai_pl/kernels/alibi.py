"""Attention with linear biases (Press et al. 2022)."""

import torch
from torch import Tensor


def alibi_bias(slopes: Tensor, T: int, S: int) -> Tensor:
    """-slope * distance for every query and key, (H,) -> (1, H, T, S), aligned as `AttentionMask` aligns them."""
    key = torch.arange(S, device=slopes.device)  # (S,)
    query = torch.arange(S - T, S, device=slopes.device)[:, None]  # (T, 1)
    return -slopes.view(1, -1, 1, 1) * (query - key).abs()
