"""Losses and ranks of rerankers against torch's definitions, and their batches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genai_pl.evaluation.labels import rank, ranking_metrics
from genai_pl.objectives import RerankCollator, SpecialTokens
from genai_pl.objectives.rerank import listwise_loss, pointwise_loss, ranking_sums

SIZES = [4, 2, 5, 3]
QUERIES = torch.arange(4).repeat_interleave(torch.tensor(SIZES))
SCORES = torch.randn(14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([1, 0, 0, 0, 0, 1, 0, 1, 0.5, 0, 0, 0, 0, 0], dtype=torch.float64)  # the last query has none


def test_the_pointwise_loss_is_binary_cross_entropy() -> None:
    expected = torch.nn.BCEWithLogitsLoss(reduction="sum")(SCORES, LABELS)
    torch.testing.assert_close(pointwise_loss(SCORES, LABELS, QUERIES), expected)


def test_the_listwise_loss_is_cross_entropy_with_the_relevance_of_each_query() -> None:
    expected = torch.zeros((), dtype=torch.float64)
    for scores, labels in zip(SCORES.split(SIZES), LABELS.split(SIZES), strict=True):
        if labels.sum() > 0:
            expected += F.cross_entropy(scores[None], (labels / labels.sum())[None])
    torch.testing.assert_close(listwise_loss(SCORES, LABELS, QUERIES), expected)
    far = SCORES * 1e4
    assert torch.isfinite(listwise_loss(far, LABELS, QUERIES))
    assert torch.autograd.gradcheck(lambda x: listwise_loss(x, LABELS, QUERIES), (SCORES.clone().requires_grad_(),))


def test_ranks_are_places_in_the_order_of_the_scores() -> None:
    pairs = list(zip(SCORES.split(SIZES), LABELS.split(SIZES), strict=True))[:3]
    places = [(labels[scores.argsort(descending=True)] > 0).int().argmax().item() + 1 for scores, labels in pairs]
    assert places == [1, 2, 1]
    n, reciprocal, first = ranking_sums(SCORES, LABELS, QUERIES)
    assert (n.item(), reciprocal.item(), first.item()) == (3, pytest.approx(1 + 1 / 2 + 1), 2)
    found = ranking_metrics([rank(scores.tolist(), [label > 0 for label in labels]) for scores, labels in pairs])
    assert (found["mrr"], found["recall@1"]) == pytest.approx((2.5 / 3, 2 / 3))


def test_a_tie_counts_against_the_relevant_document() -> None:
    assert ranking_sums(torch.zeros(3), torch.tensor([1.0, 0, 0]), torch.zeros(3, dtype=torch.long))[1:] == (
        pytest.approx(1 / 3),
        0,
    )
    assert rank([0.0, 0.0], [True, False]).reciprocal_rank == 0.5


def test_a_batch_lays_the_pairs_of_all_queries_out() -> None:
    rows = [
        {
            "pairs": [np.array([1, 2]), np.array([3])],
            "labels": np.array([1, 0]),
            "types": [np.array([0, 1]), np.array([0])],
        },
        {"pairs": [np.array([4])], "labels": np.array([0]), "types": [np.array([0])]},
    ]
    collator = RerankCollator(vocabulary=SpecialTokens(size=9, pad=8))
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 8], [4, 8]]
    assert (batch["queries"].tolist(), batch["targets"].item(), "token_type_ids" in batch) == ([0, 0, 1], 3, False)
    collator.listwise, collator.types = True, True
    batch = collator(rows)
    assert (batch["targets"].item(), batch["token_type_ids"].tolist()) == (1, [[0, 1], [0, 0], [0, 0]])
