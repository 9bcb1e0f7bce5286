"""MXFP4: numbers of 4 bits in blocks of 32 that share an exponent (Open Compute Project 2023, OCP Microscaling Formats).

gpt-oss stores its experts so, as two tensors: NAME_blocks (E, out, in / 32, 16) with two numbers in a byte, the lower four
bits first, and NAME_scales (E, out, in / 32), exponents of 2 with 127 added.
"""

import torch
from torch import Tensor

from genai_pl.errors import CheckpointError

BLOCKS, SCALES = "_blocks", "_scales"  # ends of the two names
BIAS = 127  # of the exponents
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # of four bits: E2M1


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers (E, in, out) in bfloat16, exactly, of blocks and scales (both uint8).

    >>> dequantized(torch.full((1, 1, 1, 16), 0x72, dtype=torch.uint8), torch.full((1, 1, 1), 128, dtype=torch.uint8))[0, :3, 0]
    tensor([ 2., 12.,  2.], dtype=torch.bfloat16)
    """
    values = torch.tensor(VALUES, dtype=torch.bfloat16, device=blocks.device)
    numbers = values[torch.stack([blocks & 0x0F, blocks >> 4], dim=-1).flatten(-2).int()]  # (E, out, in / 32, 32)
    scaled = torch.ldexp(numbers, scales[..., None].int() - BIAS)
    return scaled.flatten(-2).mT.contiguous()


def dequantized_shape(blocks: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (E, in, out) that blocks of this shape (E, out, in / 32, 16) come to; CheckpointError for others."""
    if len(blocks) != 4 or blocks[-1] != 16 or scales != blocks[:-1]:
        raise CheckpointError(f"{BLOCKS} {[*blocks]} and {SCALES} {[*scales]} are no MXFP4")
    E, out, groups, width = blocks
    return E, groups * width * 2, out
