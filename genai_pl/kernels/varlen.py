"""Attention of packed rows through torch's `varlen_attn`: flash attention over documents that are laid end to end.

For bf16 and fp16 on a GPU. All rows of a batch become one, and a table of where documents begin takes the place of a mask,
so that packed rows cost what their documents do. `attention_probe.py` compares it with the other backends.
"""

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.kernels.mask import AttentionMask
from genai_pl.kernels.score_options import ScoreOptions

HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None  # torch 2.10 and newer
DTYPES = (torch.bfloat16, torch.float16)


class Documents(NamedTuple):
    """The documents of all rows in one row.

    starts   (N + 1,) int32, where each begins and the last ends; a run of padding counts as one
    longest  tokens of the longest
    padding  (B, 1, T, 1), True where a row has padding; None without segments
    """

    starts: Tensor
    longest: int
    padding: Tensor | None


def varlen_unsupported(
    device: torch.device,
    *,
    head_dim: int,
    dtype: torch.dtype,
    lengths: tuple[int, int],
    mask: AttentionMask,
    options: ScoreOptions,
) -> str | None:
    """The reason why `varlen_attn` cannot compute this, None where supported; lengths: queries T and keys S."""
    if not HAS_VARLEN:
        return "this torch has no varlen_attn"
    if device.type != "cuda":
        return f"varlen_attn needs a GPU, not {device.type}"
    if dtype not in DTYPES:
        return f"varlen_attn has no kernels for {dtype}"
    if head_dim > 256 or head_dim % 8:
        return f"varlen_attn takes heads of at most 256 dimensions in eights, not {head_dim}"
    if any(x is not None for x in (options.softcap, options.bias, options.alibi, options.sinks)) or options.dropout_p:
        return "varlen_attn has no softcap, bias, ALiBi, sinks or dropout"
    if torch.compiler.is_compiling():
        return "torch.compile cannot trace how many documents there are"
    return _mask_unsupported(mask, *lengths, device)


def _mask_unsupported(mask: AttentionMask, T: int, S: int, device: torch.device) -> str | None:
    """The reason why a mask is no table of documents, None where it is."""
    rules = (mask.prefix, mask.order, mask.global_prefix, mask.query_segments)
    if T != S or any(rule is not None for rule in rules):
        return "varlen_attn takes documents, causal masks and windows of whole rows only"
    if mask.segments is not None and documents(mask, mask.segments.shape[0], T, device) is None:
        return "varlen_attn takes no documents with gaps"
    return None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, options: ScoreOptions) -> Tensor:
    """`reference_attention`, (B, H, T, D), for what `varlen_unsupported` lets through; padding gets zeros."""
    from torch.nn.attention.varlen import varlen_attn

    (B, H, T, _), kind = q.shape, q.device.type
    if torch.is_autocast_enabled(kind):  # which does not know the operator
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    starts, longest, padding = documents(mask, B, T, q.device)
    reach = -1 if mask.window is None else mask.window - 1
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B T, H or K, D)
    window = (reach, 0 if mask.causal else reach)
    y = varlen_attn(
        q, k, v, starts, starts, longest, longest, scale=options.scale, window_size=window, enable_gqa=k.shape[1] != H
    )
    y = y.unflatten(0, (B, T)).transpose(1, 2)
    return y if padding is None else y.masked_fill(padding, 0.0)


def documents(mask: AttentionMask, B: int, T: int, device: torch.device) -> Documents | None:
    """The documents of a mask for B rows of T tokens, built once for all layers; None if one of them has gaps.

    >>> documents(AttentionMask(segments=torch.tensor([[1, 1, 2, 0]])), 1, 4, torch.device("cpu")).starts.tolist()
    [0, 2, 3, 4]
    """
    return mask.remember("documents", (B, T, device), lambda: _build(mask.segments, B, T, device))


def _build(segments: Tensor | None, B: int, T: int, device: torch.device) -> Documents | None:
    """`documents`; a device waits once, for how many there are."""
    if segments is None:
        return Documents(torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device), T, None)
    segments = segments.expand(B, T)
    begins = _changes(segments)
    starts = torch.cat([begins.flatten().nonzero().flatten(), torch.full((1,), B * T, device=device)])
    # a document with a gap begins twice
    ordered = segments.sort(dim=1).values
    n_distinct = (_changes(ordered) & (ordered != 0)).sum()
    counts = torch.stack([(begins & (segments != 0)).sum(), n_distinct, starts.diff().max()])
    n_begun, n_distinct, longest = counts.tolist()
    padding = (segments == 0)[:, None, :, None]
    return Documents(starts.int(), longest, padding) if n_begun == n_distinct else None


def _changes(ids: Tensor) -> Tensor:
    """True at the first entry of each run of equal ids in a row, (B, T)."""
    changes = torch.ones_like(ids, dtype=torch.bool)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return changes
