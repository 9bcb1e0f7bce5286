"""Int8 weights: codes in 8 bits with one scale for each output channel, symmetric around zero."""

import torch
from torch import Tensor


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) int8, and scales (out,) that map the largest magnitude of each row to 127."""
    scales = weight.float().abs().amax(dim=1) / 127
    return (weight.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8), scales


def from_int8(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """The weight in float32, of the given shape."""
    return (codes.float() * scales[:, None]).view(shape)
