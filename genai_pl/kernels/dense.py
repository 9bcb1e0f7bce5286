"""Dense attention: three products in the dtype of the queries, with all (B, H, T, S) attention probabilities in memory at once.

torch's fused kernel never holds them, and computes every product of a CPU in float32 on the way. Where the processor
multiplies bfloat16 in one instruction and rows are short, the plain products are faster: forward and backward of 8 rows of
256 tokens with 4 heads of 40 take 14 ms instead of 24 (one thread of an EPYC with AVX512-BF16, torch 2.13); at 1,024 tokens
the fused kernel is ahead again. `attention.py` decides; scores are rounded to the dtype, which the fused kernel does not do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions
from genai_pl.kernels.sdpa import additive_mask, sdpa_unsupported, total_bias


def dense_unsupported(*, softcap: float | None = None) -> str | None:
    """The reason why `dense_attention` cannot compute this, None where supported: as for the fused kernel."""
    return sdpa_unsupported(softcap=softcap)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions = PLAIN) -> Tensor:
    """`reference_attention` without softcap, (B, H, T, D), with scores and weights in the dtype of q.

    The G query heads of a key head are rows of one product: keys and values are not repeated.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if options.scale is None else options.scale
    additive, blind = _additive_and_blind(q, S, mask, options)
    with torch.autocast(q.device.type, enabled=False):
        # scores: the queries are scaled, which is less work than to scale T x S numbers
        rows = (q * scale).reshape(B, K, H // K * T, D)
        scores = (rows @ k.transpose(-1, -2)).view(B, H, T, S)
        scores = scores if additive is None else scores + additive
        if options.sinks is None:
            weights = torch.softmax(scores, dim=-1)
        else:  # a first key of value zero: its column takes a share and is dropped
            sinks = options.sinks.to(scores.dtype).view(1, H, 1, 1).expand(B, H, T, 1)
            weights = torch.softmax(torch.cat([sinks, scores], dim=-1), dim=-1)[..., 1:]
        weights = F.dropout(weights, options.dropout_p)
        out = (weights.reshape(B, K, H // K * T, S) @ v).view(B, H, T, -1)
    # a query that sees no key sees all of them above, as -inf throughout has no softmax: its result and gradients are 0
    return out if blind is None else out.masked_fill(blind, 0.0)


def _additive_and_blind(
    q: Tensor, S: int, mask: AttentionMask, options: ScoreOptions
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores, as of `additive_mask` but open for blind queries, and True for those, (B or 1, 1, T, 1).

    blind is None where no query can be blind, and both are where nothing is hidden or added.
    """
    T, total = q.shape[2], total_bias(q, S, options)
    if mask.sees_all(T, S):
        return total, None
    if mask.is_plain_causal(T, S):
        return additive_mask(q, S, mask, options), None

    def build() -> tuple[Tensor, Tensor, Tensor]:
        visible = mask.dense(T, S, q.device)
        blind = ~visible.any(-1, keepdim=True)
        visible = visible | blind
        return visible, torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, float("-inf")), blind

    visible, additive, blind = mask.remember("open", (T, S, q.dtype, q.device), build)  # once for all layers
    return (additive if total is None else torch.where(visible, total, float("-inf"))), blind
