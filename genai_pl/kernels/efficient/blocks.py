"""A sequence cut into blocks of equal length."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_blocks(x: Tensor, block: int) -> Tensor:
    """Zeros after the last position, (..., L, D) -> (..., N * block, D)."""
    missing = -x.shape[-2] % block
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def cut(x: Tensor, block: int) -> Tensor:
    """(..., N * block, D) -> (..., N, block, D)."""
    return x.unflatten(-2, (-1, block))


def cut_with_neighbours(x: Tensor, block: int, *, before: int, after: int) -> Tensor:
    """Each block between the positions before and after it, (..., N * block, D) -> (..., N, before + block + after, D).

    At most one block's length on either side; zeros stand beyond the ends.
    """
    blocks = cut(x, block)
    parts = [blocks]
    if before:
        parts.insert(0, F.pad(blocks[..., :-1, block - before :, :], (0, 0, 0, 0, 1, 0)))
    if after:
        parts.append(F.pad(blocks[..., 1:, :after, :], (0, 0, 0, 0, 0, 1)))
    return torch.cat(parts, dim=-2)
