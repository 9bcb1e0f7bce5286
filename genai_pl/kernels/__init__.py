"""Kernels: attention and the loss over a large vocabulary, the two computations worth code of their own.

`attention(q, k, v, mask, ...)` and `linear_cross_entropy(hidden, weight, labels, ...)` are the doors; behind each of them
are a specification in plain tensor operations, faster code for a CPU, and Triton for a GPU, all tested against the first.
"""

from genai_pl.kernels.attention import BACKENDS, attention, attention_with, choose_backend
from genai_pl.kernels.cross_entropy import GroupSums, linear_cross_entropy
from genai_pl.kernels.logprobs import linear_logprobs
from genai_pl.kernels.mask import AttentionMask, positions_from_segments
from genai_pl.kernels.score_options import ScoreOptions
from genai_pl.kernels.vector_math import resolve_vector_math

__all__ = [
    "BACKENDS",
    "AttentionMask",
    "GroupSums",
    "ScoreOptions",
    "attention",
    "attention_with",
    "choose_backend",
    "linear_cross_entropy",
    "linear_logprobs",
    "positions_from_segments",
]

resolve_vector_math()  # at import, before any thread computes
