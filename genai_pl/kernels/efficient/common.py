"""Blocks of equal length along a sequence, and the refusal of options that a kind does not compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import ScoreOptions

FIXES = {  # name -> what it is, and the option that turns it off
    "window": ("a window", "model.window=null"),
    "order": ("permutation masks", "model.attention_kind=full"),
    "prefix": ("a bidirectional prefix", "model.attention_kind=full"),
    "bias": ("biases of the scores", "model.position=rotary"),
    "alibi": ("ALiBi", "model.position=rotary"),
    "sinks": ("attention sinks", "model.attention_kind=full"),
    "softcap": ("a softcap", "model.softcap=null"),
    "dropout": ("attention dropout", "model.dropout=0"),
}


def refuse(
    kind: str, mask: AttentionMask, options: ScoreOptions, *, supported: tuple[str, ...] = (), window: int | None = None
) -> None:
    """ConfigError for a score option that is not `supported`, and for a mask with an order, a prefix or another window.

    kind: the name in the error. supported: names of FIXES that this kind computes. window: the one that the kind has.
    """
    requested = {
        "window": mask.window not in (None, window),
        "order": mask.order is not None,
        "prefix": mask.prefix is not None,
        "bias": options.bias is not None,
        "alibi": options.alibi is not None,
        "sinks": options.sinks is not None,
        "softcap": options.softcap is not None,
        "dropout": options.dropout_p > 0.0,
    }
    for name, is_set in requested.items():
        if is_set and name not in supported:
            what, fix = FIXES[name]
            raise ConfigError(f"model.attention_kind={kind} has no {what}: set {fix}{_or_full(fix)}")


def _or_full(fix: str) -> str:
    """The second way out: exact attention."""
    return "" if fix == "model.attention_kind=full" else ", or model.attention_kind=full"


def pad_to_blocks(x: Tensor, block: int) -> Tensor:
    """Zeros after the last position, (..., L, D) -> (..., N * block, D)."""
    missing = -x.shape[-2] % block
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def split_into_blocks(x: Tensor, block: int) -> Tensor:
    """Blocks of a padded sequence, (..., N * block, D) -> (..., N, block, D), without a copy."""
    return x.unflatten(-2, (-1, block))


def blocks_with_neighbours(x: Tensor, block: int, *, before: int, after: int) -> Tensor:
    """Each block between the positions before and after it, (..., N * block, D) -> (..., N, before + block + after, D).

    before, after: at most one block's length. Zeros stand beyond the ends of the sequence.
    """
    blocks = split_into_blocks(x, block)
    parts = [blocks]
    if before:
        parts.insert(0, F.pad(blocks[..., :-1, block - before :, :], (0, 0, 0, 0, 1, 0)))
    if after:
        parts.append(F.pad(blocks[..., 1:, :after, :], (0, 0, 0, 0, 0, 1)))
    return torch.cat(parts, dim=-2)
