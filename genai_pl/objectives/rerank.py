"""Reranking: a cross-encoder reads a query with each document and gives the pair a score. Collator and losses."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens


class RerankCollator(Collator):
    """input_ids and segment_ids (N, T) of the N pairs of all queries, labels (N,), queries (N,) and targets.

    Examples are {"pairs": a list of token ids, "labels": numbers} of one query, and "types" where the tokenizer makes them.
    queries: the row of each pair's query. targets: pairs, or with `listwise` queries that have a relevant document.
    types: whether the model reads token_type_ids. Both are set by the module.
    """

    listwise: bool = False
    types: bool = False

    def __init__(self, *, vocabulary: SpecialTokens) -> None:
        self.pad = vocabulary.pad

    def __call__(self, rows: Sequence[Example]) -> Batch:
        pairs = [pair for row in rows for pair in row["pairs"]]
        labels = np.concatenate([row["labels"] for row in rows])
        n = sum(float(row["labels"].sum() > 0) for row in rows) if self.listwise else float(len(pairs))
        batch = {
            "input_ids": pad_rows(pairs, self.pad),
            "segment_ids": pad_rows([np.ones(len(pair)) for pair in pairs], 0),
            "labels": torch.from_numpy(labels.astype(np.float32)),
            "queries": torch.tensor([n for n, row in enumerate(rows) for _ in row["pairs"]]),
            "targets": torch.tensor(n),
        }
        if self.types and "types" in rows[0]:
            batch["token_type_ids"] = pad_rows([types for row in rows for types in row["types"]], 0)
        return batch


def pointwise_loss(scores: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Binary cross entropy of the scores (N,) of pairs and their relevance from 0 to 1, summed (Nogueira and Cho 2019, eq. 1)."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")


def listwise_loss(scores: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Cross entropy between relevance, divided by its sum, and the softmax of the scores over the documents of each query.

    scores, labels, queries: (N,) of all pairs; summed over queries with a relevant document (Cao et al. 2007, section 4.2,
    with relevance itself for the target distribution).
    """
    n = int(queries.max()) + 1
    # the softmax of each group, from the group's largest score
    largest = scores.new_full((n,), float("-inf")).scatter_reduce(0, queries, scores.detach(), "amax")
    shifted = scores - largest[queries]
    sums = scores.new_zeros(n).index_add(0, queries, shifted.exp())
    logprobs = shifted - sums.log()[queries]
    relevance = labels.new_zeros(n).index_add(0, queries, labels)[queries]
    return -(labels / relevance.clamp(min=torch.finfo(labels.dtype).tiny) * logprobs).sum()


LOSSES = {"pointwise": pointwise_loss, "listwise": listwise_loss}


def ranking_sums(scores: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(queries, sum of reciprocal ranks, first places) over the queries that have relevant and other documents.

    The rank is that of the first document with a relevance above 0; a document of an equal score counts as before it.
    """
    n = int(queries.max()) + 1
    relevant = labels > 0
    low = scores.new_full((n,), float("-inf"))
    best = low.scatter_reduce(0, queries[relevant], scores[relevant], "amax")  # of each query
    others = scores.new_zeros(n).index_add(0, queries, (~relevant).to(scores.dtype))
    before = scores.new_zeros(n).index_add(0, queries, (~relevant & (scores >= best[queries])).to(scores.dtype))
    counted = (best > low) & (others > 0)
    return counted.sum(), (counted / (1 + before)).sum(), (counted & (before == 0)).sum()
