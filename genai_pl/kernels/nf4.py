"""NF4 weights: codes of 4 bits for 16 quantiles of a normal distribution, with a scale for each 64 (QLoRA, Dettmers et al. 2023).

A block is 36 bytes: the scale in float32, which is the largest magnitude of its weights, then 32 bytes with two codes each,
the earlier one in the high half. Blocks run over the flattened weight, as in bitsandbytes; the last one is padded with zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64  # weights that share a scale
BLOCK = 36  # bytes of a group


def nf4_levels() -> list[float]:
    """The 16 values of a 4-bit NormalFloat, rising from -1 to 1: quantiles of a normal distribution, and zero (appendix E).

    Seven values are negative and eight positive; a symmetric choice of 16 values would have no exact zero.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2  # the probability whose quantile is scaled to 1
    below, above = (torch.special.ndtri(torch.linspace(outermost, 0.5, n, dtype=torch.float64)) for n in (8, 9))
    levels = torch.cat([-below, above.flip(0)[1:]])
    return (levels / levels[-1]).tolist()


NF4 = nf4_levels()


def to_nf4(weight: Tensor) -> Tensor:
    """Blocks (N / 64, 36) uint8 of a weight of N numbers."""
    groups = F.pad(weight.float().flatten(), (0, -weight.numel() % GROUP)).view(-1, GROUP)
    scales = groups.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    # the nearest level: its index is the number of midpoints below the value
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(groups / scales.clamp_min(torch.finfo(torch.float32).tiny), between, out_int32=True).to(
        torch.uint8
    )
    return torch.cat([scales.view(torch.uint8), codes[:, ::2] << 4 | codes[:, 1::2]], dim=1)


def from_nf4(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The weight in float32, of the given shape. One table look-up decodes both codes of a byte."""
    levels = torch.tensor(NF4, dtype=torch.float32, device=blocks.device)
    pairs = torch.cartesian_prod(levels, levels)  # (256, 2): the two values of each byte
    scales = blocks[:, :4].contiguous().view(torch.float32)
    values = F.embedding(blocks[:, 4:].int(), pairs).view(-1, GROUP)
    return (values * scales).flatten()[: shape.numel()].view(shape)
