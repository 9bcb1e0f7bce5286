"""Vector math of the CPU (cosine, exponential, ...): resolve which variant runs, before several threads call it first.

PyTorch computes them by Intel's MKL, which finds out what the processor can do at the first call. Releases 2024.2 and older
publish an intermediate result of that search before the final one; a thread that reads it takes the half-precise AVX2
function for its share of this one call. On Intel processors with AVX-512 two equal runs so differ from their first rotary
table on, by up to 1.5e-4 (pytorch/pytorch issue 188792, open in torch 2.13).
"""

import torch

FUNCTIONS = (
    "cos",
    "sin",
    "tan",
    "tanh",
    "exp",
    "expm1",
    "log",
    "log1p",
    "log2",
    "log10",
    "sqrt",
    "erf",
    "erfc",
    "erfinv",
)


def resolve_vector_math() -> None:
    """Call each function on one number, in this thread alone: MKL knows the processor from here on."""
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype)
        for name in FUNCTIONS:
            getattr(torch, name)(one)
        torch.pow(one, one)
