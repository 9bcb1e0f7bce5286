"""Dense attention: three products in the dtype of the queries, with all (B, H, T, S) weights in memory at once.

torch's fused kernel never holds the weights, and computes every product of a CPU in float32 on the way. Where the processor
multiplies bfloat16 in one instruction and rows are short, the plain products are faster: forward and backward of 8 rows of
256 tokens with 4 heads of 40 take 14 ms instead of 24 (one thread of an EPYC with AVX512-BF16, torch 2.13); at 1,024 tokens
the fused kernel is ahead again. `attention.py` decides; scores are rounded to the dtype, which the fused kernel does not do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import PLAIN, ScoreOptions
from genai_pl.kernels.sdpa import additive_mask, sdpa_lacks


def dense_lacks(*, softcap: float | None = None) -> str | None:
    """The reason why `dense_attention` cannot compute this, or None where it can: what the fused kernel lacks, it lacks."""
    return sdpa_lacks(softcap=softcap)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions = PLAIN) -> Tensor:
    """`reference_attention` without softcap, (B, H, T, D), with scores and weights in the dtype of q.

    The G query heads of a key head are rows of one product: keys and values are not repeated.
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if options.scale is None else options.scale
    with torch.autocast(q.device.type, enabled=False):
        # scores: the queries are scaled, which is less work than to scale T x S numbers
        rows = (q * scale).reshape(B, K, H // K * T, D)
        scores = (rows @ k.transpose(-1, -2)).view(B, H, T, S)
        additive = additive_mask(q, S, mask, options)
        if additive is not None:
            scores = scores + additive
        # a row that sees no key is -inf throughout, and its softmax NaN: set to 0, as its gradient
        blind = None if additive is None or mask.is_plain_causal(T, S) else _blind_queries(mask, T, S, q.device)
        if blind is not None:
            scores = scores.masked_fill(blind, 0.0)
        weights = torch.softmax(scores, dim=-1)
        if blind is not None:
            weights = weights.masked_fill(blind, 0.0)
        weights = F.dropout(weights, options.dropout_p)
        return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, -1)


def _blind_queries(mask: AttentionMask, T: int, S: int, device: torch.device) -> Tensor | None:
    """True for queries that see no key, (B or 1, 1, T, 1), asked once for all layers; None if every query sees one."""

    def build() -> Tensor | None:
        blind = ~mask.dense(T, S, device).any(-1, keepdim=True)
        return blind if blind.any() else None

    return mask.remember("blind", (T, S, device), build)
