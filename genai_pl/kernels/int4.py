"""Int4 weights: codes in 4 bits, in groups of 32 along the inputs, each with a scale and a minimum of 16 bits.

A group is a block of 20 bytes: scale and minimum in bfloat16, then 16 bytes, of which byte j has code j in its low half and
code j + 16 in its high half. So a weight takes 5 bits, and a product reads one stream. A weight is code * scale + minimum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32  # weights that share a scale and a minimum
BLOCK = 20  # bytes of a group
LARGEST = 15  # code
FITS = 3  # least-squares fits of scale and minimum to the codes
TINY = torch.finfo(torch.float32).tiny  # divides where all weights of a group are equal
AT_ONCE = 1 << 17  # weights that are quantized at a time, so that they stay in a cache


def to_int4(weight: Tensor) -> Tensor:
    """Blocks (out, groups * 20) uint8 of the weight (out, in); the last group of a row is filled up with copies.

    Scale and minimum are first those of the group's range, then the least-squares fit to the codes, a few times; those with
    the least squared error are kept.
    """
    out, width = weight.shape
    weight = F.pad(weight.detach().float(), (0, -width % GROUP), mode="replicate") if width % GROUP else weight.detach()
    blocks = torch.empty(out, weight.shape[1] // GROUP * BLOCK, dtype=torch.uint8, device=weight.device)
    rows = max(1, AT_ONCE // max(1, weight.shape[1]))
    for part, packed in zip(weight.split(rows), blocks.split(rows), strict=True):
        packed.copy_(_pack(*_quantize(part.float().reshape(-1, GROUP))).view(packed.shape))
    return blocks


def from_int4(blocks: Tensor, width: int) -> Tensor:
    """The weight (out, width) in float32 of blocks (out, groups * 20)."""
    scale, low = ends_of(blocks)
    codes = codes_of(blocks).float().view(len(blocks), -1, GROUP)
    return torch.addcmul(low[..., None], codes, scale[..., None]).flatten(1)[:, :width]


def ends_of(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minimums, both (out, groups) in float32."""
    ends = blocks.view(len(blocks), -1, BLOCK)[..., :4].contiguous().view(torch.bfloat16).float()
    return ends[..., 0], ends[..., 1]


def codes_of(blocks: Tensor) -> Tensor:
    """Codes (out, groups * 32) uint8, from 0 to 15."""
    pairs = blocks.view(len(blocks), -1, BLOCK)[..., 4:]
    return torch.cat([pairs & LARGEST, pairs >> 4], dim=-1).flatten(1)


def _quantize(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, 32), and scales and minimums (N, 1), all float32, of weights (N, 32)."""
    start, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - start) / LARGEST
    mean = groups.mean(1, keepdim=True)
    centred = groups - mean
    best: tuple[Tensor, ...] = ()
    for fit in range(1 + FITS):
        # codes for the scale and minimum that are stored, and their error
        scale, start = _rounded(scale), _rounded(start)
        codes = ((groups - start) / scale.clamp_min(TINY)).round_().clamp_(0, LARGEST)
        error = torch.addcmul(start, codes, scale).sub_(groups).square_().sum(1, keepdim=True)
        found = (error, codes, scale, start)
        if best:
            better = error < best[0]
            found = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        best = found
        # the scale and minimum that fit these codes best
        if fit < FITS:
            of_codes = codes.mean(1, keepdim=True)
            away = codes - of_codes
            scale = (away * centred).sum(1, keepdim=True) / away.square().sum(1, keepdim=True).clamp_min(TINY)
            start = mean - of_codes * scale
    _, codes, scale, start = best
    return codes, scale, start


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def _pack(codes: Tensor, scale: Tensor, start: Tensor) -> Tensor:
    """Blocks (N, 20) uint8 of codes (N, 32), scales and minimums (N, 1)."""
    low, high = codes.to(torch.uint8).chunk(2, dim=1)
    ends = torch.cat([scale, start], dim=1).bfloat16().view(torch.uint8)
    return torch.cat([ends, low | (high << 4)], dim=1)
