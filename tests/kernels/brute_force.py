"""Visibility and attention written out in loops, straight from the words of the definitions."""

import math
from typing import Any

import torch
from torch import Tensor

from genai_pl.kernels import AttentionMask


def value(rows: Any, b: int, i: int) -> int:
    return int(rows[b % len(rows)][i])


def sees(mask: AttentionMask, b: int, i: int, j: int, T: int, S: int) -> bool:
    """True if query i of batch row b sees key j."""
    position = S - T + i
    near = True
    if mask.causal and j > position:
        near = False
    if mask.window is not None and abs(position - j) >= mask.window:
        near = False
    if mask.prefix is not None:
        length = mask.prefix if isinstance(mask.prefix, int) else int(mask.prefix[b])
        near = near or j < length
    if mask.segments is not None:
        own = value(mask.segments, b, position) if mask.query_segments is None else value(mask.query_segments, b, i)
        near = near and own != 0 and own == value(mask.segments, b, j)
    if mask.global_prefix is not None:
        length = mask.global_prefix if isinstance(mask.global_prefix, int) else int(mask.global_prefix[b])
        near = near or (j < length and not (mask.causal and j > position))
    if not near:
        return False
    if mask.order is not None:
        own, other = value(mask.order, b, position), value(mask.order, b, j)
        if other > own or (mask.strict and other == own):
            return False
    return True


def visible(mask: AttentionMask, B: int, T: int, S: int) -> Tensor:
    """(B, 1, T, S)."""
    return torch.tensor([[[[sees(mask, b, i, j, T, S) for j in range(S)] for i in range(T)]] for b in range(B)])


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(B, H, T, D), a Python number at a time."""
    B, H, T, _ = q.shape
    S, group = k.shape[2], H // k.shape[1]
    out = torch.zeros_like(q)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(T)):
        weights = {}
        for j in range(S):
            if not sees(mask, b, i, j, T, S):
                continue
            score = float((q[b, h, i] * k[b, h // group, j]).sum()) * scale
            if softcap is not None:
                score = softcap * math.tanh(score / softcap)
            if bias is not None:
                score += float(bias.expand(B, H, T, S)[b, h, i, j])
            if alibi is not None:
                score -= float(alibi[h]) * abs(S - T + i - j)
            weights[j] = math.exp(score)
        total = sum(weights.values()) + (0.0 if sinks is None else math.exp(float(sinks[h])))
        for j, weight in weights.items():
            out[b, h, i] += weight / total * v[b, h // group, j]
    return out
