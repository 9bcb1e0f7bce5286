"""Attention through torch's scaled_dot_product_attention, which picks the fused kernel of the device.

The default on a CPU. The mask becomes a flag where it is empty or plainly causal, and a (T, S) tensor of 0 and -inf
elsewhere, built once for all layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.alibi import alibi_bias
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions


def sdpa_lacks(*, softcap: float | None = None) -> str | None:
    """The reason why scaled_dot_product_attention cannot compute this, or None where it can."""
    return None if softcap is None else f"scaled_dot_product_attention has no softcap ({softcap})"


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    options: ScoreOptions = PLAIN,
) -> Tensor:
    """`reference_attention` without softcap, (B, H, T, D), by torch's fused kernel.

    No (T, S) mask is built where the mask hides nothing, or is the lower triangle of a square.
    """
    T, S = q.shape[2], k.shape[2]
    # torch aligns is_causal at the top left, we at the bottom right: the same on a square only
    is_causal = options.bias is None and options.alibi is None and mask.is_plain_causal(T, S)
    additive = None if is_causal else additive_mask(q, S, mask, options)
    # a literal True: under torch.compile the comparison may be symbolic, which the argument must not be
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=additive,
        dropout_p=options.dropout_p,
        is_causal=is_causal,
        scale=options.scale,
        **grouped,
    )


def additive_mask(q: Tensor, S: int, mask: AttentionMask, options: ScoreOptions) -> Tensor | None:
    """Biases, and -inf where the mask hides, broadcastable to (B, H, T, S), in the dtype of the queries; None for all 0."""
    T, total = q.shape[2], total_bias(q, S, options)
    if mask.sees_all(T, S):
        return total
    # torch converts a mask of booleans to numbers in every layer, and keeps each for backward: convert it once
    if total is None:
        return mask.additive(T, S, q.dtype, q.device)
    return torch.where(mask.dense(T, S, q.device), total, float("-inf"))


def total_bias(q: Tensor, S: int, options: ScoreOptions) -> Tensor | None:
    """The sum of bias and ALiBi, broadcastable to (B, H, T, S), in the dtype of the queries; None without either."""
    terms = [] if options.bias is None else [options.bias]
    if options.alibi is not None:
        terms.append(alibi_bias(options.alibi, q.shape[2], S))
    return sum(terms[1:], terms[0]).to(q.dtype) if terms else None
