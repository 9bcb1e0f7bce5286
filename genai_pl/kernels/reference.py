"""Reference attention: plain tensor operations, the specification that every faster backend is tested against.

It materializes the (B, H, T, S) scores, which the others avoid. The order of the steps is the contract: scale, softcap,
bias and ALiBi, mask, sinks, softmax, dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.alibi import alibi_bias
from genai_pl.kernels.mask import AttentionMask


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(softcap(q k^T * scale) + bias + alibi) v over the visible keys, (B, H, T, D), computed in float32.

    sinks (H,) enter the softmax as the score of one more key, whose value is zero. float64 inputs are computed in float64. A
    query that sees no key gets zeros and gives zero gradient.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    _, H, T, D = q.shape
    K, S = k.shape[1:3]
    with torch.autocast(q.device.type, enabled=False):
        keys = k.to(exact).repeat_interleave(H // K, dim=1)  # (B, H, S, D)
        values = v.to(exact).repeat_interleave(H // K, dim=1)  # (B, H, S, D)
        # scores, then weights, then the mean of values
        scores = q.to(exact) @ keys.transpose(-2, -1) * (D**-0.5 if scale is None else scale)  # (B, H, T, S)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias.to(exact)
        if alibi is not None:
            scores = scores + alibi_bias(alibi.to(exact), T, S)
        weights = F.dropout(_visible_softmax(scores, mask.dense(T, S, q.device), sinks), dropout_p)
        return (weights @ values).to(q.dtype)


def _visible_softmax(scores: Tensor, visible: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the visible entries of each row and its head's sink, and zeros for a row without any, (B, H, T, S)."""
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)  # (B, H, T, 1)
        shown = scores.masked_fill(~visible, float("-inf"))
        return torch.cat([column, shown], dim=-1).softmax(-1)[..., 1:]
    blind = ~visible.any(-1, keepdim=True)  # (B or 1, 1, T, 1)
    # a row of -inf alone is NaN in the softmax, and anomaly detection stops at it: show it everything, then set it to 0
    weights = scores.masked_fill(~(visible | blind), float("-inf")).softmax(-1)
    return weights.masked_fill(~visible, 0.0)
