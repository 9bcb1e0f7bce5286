"""Positions: sines, rotary tables with their scalings, and ALiBi slopes, as functions of integer positions.

No table is stored: a function takes the positions of the tokens at hand, so that any length, packed documents, padding on
the left and offsets in a cache need no case of their own.
"""

import math

import torch
from torch import Tensor

from genai_pl.config.enums import RopeKind
from genai_pl.config.rope_scaling import RopeScaling

UNSCALED = RopeScaling()


def sinusoidal(positions: Tensor, *, n_embd: int) -> Tensor:
    """Encodings (..., C) of positions (...): sine on even, cosine on odd channels (Vaswani et al. 2017, section 3.5).

    >>> sinusoidal(torch.tensor([0, 1]), n_embd=4).round(decimals=2).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    even = torch.arange(0, n_embd, 2, device=positions.device, dtype=torch.float32)
    angle = positions[..., None].float() / 10000 ** (even / n_embd)  # (..., C/2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :n_embd]


def rotary(positions: Tensor, *, head_dim: int, theta: float, scaling: RopeScaling = UNSCALED) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each (B or 1, 1, T, D), of positions (T,) or (B, T) (Su et al. 2021, eq. 34).

    head_dim: D. theta: the base of the frequencies. scaling: how a context is stretched beyond the trained one. A pair of
    channels turns by position * frequency, so a product of query and key depends on their distance only. The first half
    of the sines is negated, as `rotate` needs it.
    """
    frequency, factor = rotary_frequencies(head_dim, theta, scaling, positions.device)
    angle = positions[..., None].float() * frequency  # (..., T, D/2)
    angle = angle[:, None] if angle.dim() == 3 else angle[None, None]
    cos, sin = angle.cos() * factor, angle.sin() * factor
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position of each pair of channels, (D/2,), and the factor of cosines and sines (1 without YaRN).

    linear divides all frequencies by the factor (Chen et al. 2023). llama3 and yarn leave fast channels alone, which see
    whole turns within the trained context, and divide slow ones, with a ramp between: `unscaled` is 1 where a frequency
    keeps its value.
    """
    channel = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequency = theta ** (-channel / head_dim)
    if scaling.kind is RopeKind.none:
        return frequency, 1.0
    if scaling.kind is RopeKind.linear:  # positions closer together (Chen et al. 2023)
        return frequency / scaling.factor, 1.0
    unscaled = (
        _llama3(frequency, scaling) if scaling.kind is RopeKind.llama3 else _yarn(head_dim, theta, scaling, device)
    )
    factor = 1.0
    if scaling.kind is RopeKind.yarn:
        factor = 0.1 * math.log(scaling.factor) + 1.0  # Peng et al. 2023, eq. 22
        factor = factor if scaling.attention_factor is None else scaling.attention_factor
    return frequency * (unscaled + (1.0 - unscaled) / scaling.factor), factor


def _llama3(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """The weight of each unscaled frequency, (D/2,) in 0..1, by its turns within the trained length (Llama 3.1's code)."""
    turns = scaling.original_max_seq_len * frequency / (2 * math.pi)
    return ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)


def _yarn(head_dim: int, theta: float, scaling: RopeScaling, device: torch.device) -> Tensor:
    """The weight of each unscaled frequency, (D/2,) in 0..1: a ramp over channels (Peng et al. 2023, eq. 18)."""

    def pair_that_turns(times: float) -> float:
        """The pair of channels that turns so often within the trained length."""
        return head_dim * math.log(scaling.original_max_seq_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pair = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    width = 0.001 if low == high else high - low  # no division by zero
    return 1.0 - ((pair - low) / width).clamp(0.0, 1.0)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Vectors x (B, H, T, D) turned by the tables of `rotary` (apply_rotary elsewhere).

    Channel i is paired with channel i + D/2, as in Llama's weights.
    x cos + roll(x) sin is the rotation of all pairs at once: with the sign of the first half in the table, a roll by D/2
    puts each channel's partner in its place.
    """
    cos, sin = (t.to(x.dtype) for t in table)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def alibi_slopes(n_head: int, *, device: torch.device | None = None) -> Tensor:
    """Per-head slopes (H,): 2^(-8/H), 2^(-16/H), ..., for H a power of two (Press et al. 2022, section 3).

    For other H, as in their code: the slopes of the largest power of two P below H, then every other one of 2P heads.

    >>> alibi_slopes(4).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 1 << (n_head.bit_length() - 1)
    head = torch.arange(n_head, device=device, dtype=torch.float32)
    exponent = torch.where(head < power, 8 * (head + 1), 4 * (2 * (head - power) + 1)) / power
    return 2.0**-exponent
