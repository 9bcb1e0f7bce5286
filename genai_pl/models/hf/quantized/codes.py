"""Codes: integers of a few bits out of words of 32, and the scales of their groups."""

import torch
from torch import Tensor

from genai_pl.errors import CheckpointError

WORD = 32  # bits


def unpacked(words: Tensor, bits: int, *, dim: int) -> Tensor:
    """Codes from 0 to 2^bits - 1, int32, of words (int32) that are one stream of bits along a dimension, lowest bits first.

    Of 3 bits, three words hold 32 codes, two of which lie in two words (GPTQ's layout).

    >>> unpacked(torch.tensor([0x76543210], dtype=torch.int32), 4, dim=0)
    tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.int32)
    """
    words = words.movedim(dim, -1).long() & 0xFFFFFFFF
    n = words.shape[-1] * WORD // bits
    at = torch.arange(n, device=words.device) * bits
    word, shift = at // WORD, at % WORD
    codes = words[..., word] >> shift
    if WORD % bits:  # the rest of a code in the word that follows
        codes |= words[..., (word + 1).clamp_max(words.shape[-1] - 1)] << (WORD - shift)
    return (codes & ((1 << bits) - 1)).int().movedim(-1, dim)


def unpacked_apart(words: Tensor, bits: int, *, dim: int) -> Tensor:
    """The same of words that hold 32 // bits codes each, and nothing in bits that are left over (compressed-tensors)."""
    words = words.movedim(dim, -1)
    shifts = torch.arange(WORD // bits, device=words.device) * bits
    codes = (words.long()[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.int().flatten(-2).movedim(-1, dim)


def spread(scales: Tensor, shape: tuple[int, int], block: tuple[int, int] | None = None) -> Tensor:
    """Scales (or zeros) of groups in float32, so that they multiply a weight of that shape (out, in).

    scales: one; (out,) or (out, 1), of rows; (out, groups), of equal groups of inputs; with `block` (rows, columns) those of
    blocks, of which the last ones may be smaller. CheckpointError for others.
    """
    (out, width), scales = shape, scales.float()
    if scales.numel() == 1:
        return scales.view(1, 1)
    if scales.shape in ((out,), (out, 1)):
        return scales.view(out, 1)
    if block is not None and scales.shape == tuple(-(-n // size) for n, size in zip(shape, block, strict=True)):
        return scales.repeat_interleave(block[0], 0)[:out].repeat_interleave(block[1], 1)[:, :width]
    if scales.ndim == 2 and len(scales) == out and width % scales.shape[1] == 0:
        return scales.repeat_interleave(width // scales.shape[1], 1)
    raise CheckpointError(f"scales {list(scales.shape)} are of no groups of a weight {list(shape)}")
