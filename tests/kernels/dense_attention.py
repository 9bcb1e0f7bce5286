"""Masks and attention written out densely in float64, to hold the efficient kinds against."""

import torch
from torch import Tensor


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(T: int, S: int | None = None, *, B: int = 2, H: int = 4, K: int = 2, D: int = 8, dtype=torch.float64):
    return [
        draw(B, heads, length, D, seed=n, dtype=dtype)
        for n, (heads, length) in enumerate(((H, T), (K, S or T), (K, S or T)))
    ]


def packed(*lengths: int, padding: int = 0) -> Tensor:
    """Segment ids of one row, (1, S): documents of these lengths, numbered from 1, and zeros."""
    ids = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return torch.tensor([ids + [0] * padding])


def shown(T: int, S: int, *, causal: bool, segments: Tensor | None = None) -> Tensor:
    """Visibility by causality and documents alone, (B or 1, 1, T, S)."""
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)
    visible = (key <= query if causal else torch.ones(T, S, dtype=torch.bool))[None, None]
    if segments is not None:
        own = segments[:, None, S - T :, None]
        visible = visible & (own == segments[:, None, None, :]) & (own != 0)
    return visible


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax attention over the visible keys, zeros where there are none, (B, H, T, D)."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-2, -1)
    weights = torch.exp(scores * (q.shape[-1] ** -0.5 if scale is None else scale)) * visible
    return average(weights, v)


def average(weights: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, S) weights of values (B, K, S, D), divided by their sums."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0) @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of a sum in which every entry of y has a weight of its own."""
    return torch.autograd.grad((y * draw(*y.shape, seed=9, dtype=y.dtype)).sum(), leaves)
