"""Contrastive embeddings: a text is more similar to its positive than to the other texts of the batch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.errors import ConfigError


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor,
    offset: int = 0,
    text_ids: Tensor | None = None,
    anchor_ids: Tensor | None = None,
    rows: Tensor | slice = slice(None),
) -> Tensor:
    """-sum_i log softmax_j(cos(a_i, c_j) / temperature) at the anchor's own positive (van den Oord et al. 2018, eq. 4).

    anchors are (B, C). The candidates c are the positives (N, C), of which offset + i belongs to anchor i (N > B if
    they come from several processes), then the negatives (M, C). Where text_ids (N + M,) are equal, candidates are the
    same text, and none is held against its double; nor is a candidate that is the anchor's own text, by anchor_ids (B,),
    held against its partner. The sum runs over the anchors of `rows`, a mask (B,) or a slice. SimCSE is this with the
    same text twice, under other dropout, at temperature 0.05 (Gao et al. 2021, eq. 1).
    """
    candidates = positives if negatives is None else torch.cat([positives, negatives])
    similarity, own, doubles = _similarity(anchors, candidates, offset, text_ids, anchor_ids)
    # masked last: an infinite cosine would give the temperature a gradient that is not a number
    logits = (similarity / temperature).masked_fill(doubles, float("-inf"))
    return F.cross_entropy(logits[rows], own[rows], reduction="sum")


def symmetric_info_nce(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float | Tensor,
    rows: slice = slice(None),
    text_ids: Tensor | None = None,
    anchor_ids: Tensor | None = None,
) -> Tensor:
    """Half of info_nce from anchors (N, C) to positives (N, C) plus half of the way back (Radford et al. 2021, fig. 3).

    The sum runs over `rows`: those of this process, where both come from several. text_ids (N,) and anchor_ids (N,) as
    in info_nce; without the latter, text_ids are those of pairs.
    """
    ways = ((anchors, positives, text_ids, anchor_ids), (positives, anchors, anchor_ids, text_ids))
    if anchor_ids is None:
        ways = ((anchors, positives, text_ids, None), (positives, anchors, text_ids, None))
    options = {"temperature": temperature, "offset": rows.start or 0}
    return sum(
        info_nce(a[rows], c, text_ids=ids, anchor_ids=None if own is None else own[rows], **options)
        for a, c, ids, own in ways
    ) / 2  # fmt: skip


def matryoshka(loss: Callable[..., Tensor], dims: Sequence[int]) -> Callable[..., Tensor]:
    """A loss that is the mean of `loss` over the first d dimensions of the embeddings, its positional arguments.

    Kusupati et al. 2022, eq. 1, where all weights are 1; the mean keeps the size of the gradient.
    """

    def mean_loss(*embeddings: Tensor | None, **options: object) -> Tensor:
        n_embd = embeddings[0].shape[-1]
        if not dims or min(dims) < 1 or max(dims) > n_embd:
            raise ConfigError(f"matryoshka dims ({list(dims)}) must lie between 1 and n_embd ({n_embd})")
        prefixes_by_dim = ([None if e is None else e[..., :dim] for e in embeddings] for dim in dims)
        return sum(loss(*prefixes, **options) for prefixes in prefixes_by_dim) / len(dims)

    return mean_loss


@torch.no_grad()
def recall_at_k(
    anchors: Tensor,
    positives: Tensor,
    k: int,
    *,
    offset: int = 0,
    text_ids: Tensor | None = None,
    anchor_ids: Tensor | None = None,
) -> Tensor:
    """The number of anchors whose positive is among the k most similar candidates; other arguments as in info_nce.

    A candidate as similar as the positive ranks before it, so embeddings that are all equal recall nothing.
    """
    similarity, own, doubles = _similarity(anchors, positives, offset, text_ids, anchor_ids)
    similarity = similarity.masked_fill(doubles, float("-inf"))
    before = (similarity >= similarity.gather(1, own[:, None])).sum(-1) - 1
    return (before < k).sum()


def _similarity(
    anchors: Tensor, candidates: Tensor, offset: int, text_ids: Tensor | None, anchor_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines (B, N), the column of each anchor's positive (B,), and which candidates equal that text or the anchor (B, N)."""
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):  # at temperature 0.05, bf16 would be off by 0.08
        similarity = F.normalize(anchors.to(dtype), dim=-1) @ F.normalize(candidates.to(dtype), dim=-1).t()
    row = torch.arange(len(anchors), device=anchors.device)
    own = row + offset
    doubles = torch.zeros_like(similarity, dtype=torch.bool)
    if text_ids is not None:
        doubles = text_ids[own, None] == text_ids
        if anchor_ids is not None:
            doubles |= anchor_ids[:, None] == text_ids
        doubles[row, own] = False
    return similarity, own, doubles
