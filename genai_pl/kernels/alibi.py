"""ALiBi: attention with linear biases instead of positions (Press et al. 2022)."""

import torch
from torch import Tensor


def alibi_bias(slopes: Tensor, T: int, S: int) -> Tensor:
    """-slope * distance of every query and key, slopes (H,) -> (1, H, T, S); the last query stands at the last key.

    >>> alibi_bias(torch.tensor([0.5]), 1, 3).tolist()
    [[[[-1.0, -0.5, -0.0]]]]
    """
    key = torch.arange(S, device=slopes.device)  # (S,)
    query = torch.arange(S - T, S, device=slopes.device)[:, None]  # (T, 1)
    return -slopes.view(1, -1, 1, 1) * (query - key).abs()
