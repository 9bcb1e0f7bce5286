"""Numbers in fewer bits, for the moments of optimizers: 8 bits block by block, and bfloat16 rounded at random.

A row of a matrix is cut into blocks of 256 numbers, each with its largest absolute value as scale, and a number becomes
the index of the nearest of 256 (Dettmers et al. 2022, section 2). Blocks end with their row, so that the shards of a
matrix by rows hold the same codes as the whole, on any number of processes.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # numbers that share a scale (Dettmers et al. 2022, section 2.1)
MIXERS = (-2048144789, -1028477387)  # of the finalizer of MurmurHash3 (Appleby 2011): 0x85EBCA6B and 0xC2B2AE35
GOLDEN = -1640531527  # 2^32 divided by the golden ratio, as int32: steps in a row give bits that differ


@cache
def dynamic_code(*, signed: bool, device: torch.device | None = None) -> Tensor:
    """The 256 numbers of dynamic tree quantization, ascending: -1 to 1, or 0 to 1 (Dettmers et al. 2022, section 1.3).

    Seven decades down to 1e-7: in each, the bits that the exponent leaves divide 0.1 to 1 evenly, and numbers lie in
    the middle of the parts. Unsigned, the sign's bit goes to the fraction.
    """
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    numbers = torch.cat(positive)
    parts = [-numbers, numbers] if signed else [numbers]
    return torch.cat([*parts, torch.tensor([0.0, 1.0])]).sort().values.float().to(device)


def to_8_bits(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (..., C) in uint8 and scales (..., ceil(C / 256)) in float32 of numbers (..., C) in float32.

    Unsigned, nothing becomes 0: a second moment of 0 below a mean that is none would make a step without bound (Li et
    al. 2023, section 3.2: the zero-point problem).
    """
    blocks = F.pad(values, (0, -values.size(-1) % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1)
    code = dynamic_code(signed=signed, device=values.device)
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    codes = torch.bucketize(shares, (code[:-1] + code[1:]) / 2, out_int32=True)
    codes = codes if signed else codes.clamp_(min=1)
    return codes.to(torch.uint8).flatten(-2)[..., : values.size(-1)].contiguous(), scales


def from_8_bits(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The numbers (..., C), in float32, of codes (..., C) and scales (..., ceil(C / 256))."""
    numbers = dynamic_code(signed=signed, device=codes.device)[codes.int()]
    return numbers * scales.repeat_interleave(BLOCK, dim=-1)[..., : codes.size(-1)]


def to_bfloat16(values: Tensor, step: Tensor) -> Tensor:
    """Numbers of float32 in bfloat16, up or down with the probabilities that keep their mean (stochastic rounding).

    step: scalar, so that the same number rounds otherwise at another step

    The random bits are a hash of the number and the step: no generator has a state to save, and shards round as the
    whole does.
    """
    bits = values.contiguous().view(torch.int32)
    noise = _hash(bits ^ (step.to(torch.int32) * GOLDEN)) & 0xFFFF
    return ((bits + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)


def _hash(bits: Tensor) -> Tensor:
    """32 bits of each 32, of which every one depends on all (the finalizer of MurmurHash3, Appleby 2011)."""
    bits = bits ^ ((bits >> 16) & 0xFFFF)  # the shift of a signed number repeats its sign
    bits = bits * MIXERS[0]
    bits = bits ^ ((bits >> 13) & 0x7FFFF)
    bits = bits * MIXERS[1]
    return bits ^ ((bits >> 16) & 0xFFFF)
