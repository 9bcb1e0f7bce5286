"""Where a token learns its place: functions of integer positions, so that any length and any packing works."""

import torch
from torch import Tensor


def sinusoidal(positions: Tensor, *, n_embd: int) -> Tensor:
    """Encodings (..., C) of positions (...): sine on even, cosine on odd channels (Vaswani et al. 2017, 3.5)."""
    even = torch.arange(0, n_embd, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() / 10000 ** (even / n_embd)  # (..., C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :n_embd]


def rotary(positions: Tensor, *, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each (B or 1, 1, T, D), of positions (T,) or (B, T) (Su et al. 2021, eq. 34)."""
    channel = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() * theta ** (-channel / head_dim)  # (..., T, D/2)
    angle = torch.cat([angle, angle], dim=-1)
    angle = angle[:, None] if angle.dim() == 3 else angle[None, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The vectors (B, H, T, D) turned by their positions; channel i is paired with channel i + D/2, as Llama does."""
    cos, sin = (t.to(x.dtype) for t in table)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def alibi_slopes(n_head: int, *, device: torch.device | None = None) -> Tensor:
    """Per-head slopes (H,): 2^(-8/H), 2^(-16/H), ..., and every other one of 2P heads where H > P, a power of two.

    Press et al. 2022, section 3 and footnote 11 of their code: 12 heads take the 8 of 8 heads and 4 of 16.
    """
    power = 1 << (n_head.bit_length() - 1)
    head = torch.arange(n_head, device=device, dtype=torch.float32)
    exponent = torch.where(head < power, 8 * (head + 1), 4 * (2 * (head - power) + 1)) / power
    return 2.0**-exponent
