"""Attention through torch's scaled_dot_product_attention, which picks the fused kernel of the device.

The default on a CPU. The mask becomes a flag where it is empty or plainly causal, and a (T, S) tensor of 0 and -inf
elsewhere, built once for all layers. Attention sinks become one more key and one more channel of the queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.alibi import alibi_bias
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions

CHANNELS = 8  # added to each head by sinks: kernels want channels in eights


def sdpa_unsupported(*, softcap: float | None = None) -> str | None:
    """The reason why scaled_dot_product_attention cannot compute this, None where supported."""
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
    if options.sinks is not None:
        return _with_sinks(q, k, v, mask, options)
    T, S = q.shape[2], k.shape[2]
    # torch aligns is_causal at the top left, we at the bottom right: the same on a square only
    is_causal = options.bias is None and options.alibi is None and mask.is_plain_causal(T, S)
    additive = None if is_causal else additive_mask(q, S, mask, options)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=additive,
        dropout_p=options.dropout_p,
        is_causal=is_causal,
        scale=options.scale,
        **_grouped(q.shape[1], k.shape[1]),
    )


def _with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
    """Attention with sinks: a first key of ones in new channels, in which each query has its head's sink over the scale.

    The value of that key is zero, so that it takes its share of the softmax and adds nothing. No (T, S) mask is built for it:
    in front of a causal square it makes, with a query of its own that is dropped again, another causal square.
    """
    (B, H, T, D), (_, K, S, D_V) = q.shape, v.shape
    scale = D**-0.5 if options.scale is None else options.scale
    unbiased = options.bias is None and options.alibi is None
    is_causal = unbiased and mask.is_plain_causal(T, S)
    width = max(D, D_V) + CHANNELS  # fused kernels want as many channels in values as in queries
    # the sinks as two numbers whose sum is exact where one is rounded to bfloat16
    exact = (options.sinks.float() if q.dtype != torch.float64 else options.sinks.double()) / scale
    high = exact.to(q.dtype)
    extra = torch.stack([high, (exact - high).to(q.dtype)], dim=-1)  # (H, 2)
    extra = F.pad(extra, (0, width - D - 2))[:, None].expand(B, H, T, -1)
    q = torch.cat([q, extra], dim=-1)
    sink_key = k.new_zeros(width)
    sink_key[D : D + 2] = 1.0
    k = torch.cat([sink_key.expand(B, K, 1, -1), F.pad(k, (0, width - D))], dim=2)  # (B, K, 1 + S, width)
    v = F.pad(v, (0, width - D_V, 1, 0))
    # the mask: the sink's column is visible to all
    additive = None if is_causal else additive_mask(q, S, mask, options)
    if is_causal:
        q = F.pad(q, (0, 0, 1, 0))
    elif additive is not None:
        additive = F.pad(additive.expand(*additive.shape[:-1], S), (1, 0))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=additive, dropout_p=options.dropout_p, is_causal=is_causal, scale=scale,
        **_grouped(H, K),
    )  # fmt: skip
    return y[:, :, is_causal:, :D_V]


def _grouped(H: int, K: int) -> dict[str, bool]:
    """The flag of grouped queries: a literal True, as under torch.compile the comparison may be symbolic."""
    return {"enable_gqa": True} if H != K else {}


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
