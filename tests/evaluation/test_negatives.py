"""Hard negatives are those of sentence-transformers 6.2, whose `mine_hard_negatives` gave the recorded numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.evaluation.negatives import MiningOptions, mine_negatives

NONE = {"relative_margin": None}
CASES = json.loads(Path(__file__).with_name("negatives.json").read_text(encoding="utf-8"))
OPTIONS = {
    "plain": {},
    "relative": {"relative_margin": 0.05},
    "relative_wide": {"relative_margin": 0.5},
    "absolute": {"absolute_margin": 0.2},
    "bounds": {"max_score": 0.5, "min_score": 0.1},
    "range": {"range_min": 2, "range_max": 6},
    "both": {"relative_margin": 0.1, "absolute_margin": 0.05, "range_min": 1, "range_max": 5},
}
POSITIVES = [[n, 12 + n] if n % 4 == 0 else [n] for n in range(12)]


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors (12, 6) and candidates (40, 6), of which the first 12 are near the anchors."""
    draw = np.random.RandomState(0)
    anchors, candidates = (torch.nn.functional.normalize(torch.tensor(draw.randn(n, 6)), dim=1) for n in (12, 40))
    candidates[:12] = torch.nn.functional.normalize(candidates[:12] + 1.5 * anchors, dim=1)
    return anchors.float(), candidates.float()


def mined(**options: object) -> list[list[int]]:
    found = mine_negatives(*vectors(), POSITIVES, MiningOptions(**{**NONE, **options}))
    return [[n for n in row if n >= 0] for row in found.indices.tolist()]


@pytest.mark.parametrize("case", OPTIONS)
def test_negatives_are_those_of_sentence_transformers(case: str) -> None:
    assert mined(**OPTIONS[case]) == CASES[case]


def test_random_negatives_are_drawn_of_those_that_remain_by_the_seed() -> None:
    options = MiningOptions(n=2, relative_margin=None, range_max=8, sampling="random")
    nearest = mined(n=8)
    first, again, other = (mine_negatives(*vectors(), POSITIVES, options, seed=seed).indices for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all({*row} <= {*near} for row, near in zip(first.tolist(), nearest, strict=True))


def test_the_text_of_the_anchor_is_no_negative_of_it() -> None:
    nearest = [row[0] for row in mined()]
    found = mine_negatives(*vectors(), POSITIVES, MiningOptions(**NONE), same_text=nearest)
    assert all(near not in row for near, row in zip(nearest, found.indices.tolist(), strict=True))
    assert found.indices[:, 0].tolist() == [row[1] for row in mined()]


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_anchors_whose_farthest_positive_is_beyond_a_rank_get_no_negatives(rank: int) -> None:
    anchors, candidates = vectors()
    similarity = (anchors @ candidates.T).numpy()
    far = []
    for row, own in zip(similarity, POSITIVES, strict=True):
        others = np.delete(row, own)
        far.append(int((others > row[own].min()).sum()) >= rank)
    assert 0 < sum(far) < len(far)
    found = mine_negatives(anchors, candidates, POSITIVES, MiningOptions(**NONE, positive_max_rank=rank))
    assert (found.indices < 0).all(1).tolist() == far
    assert found.too_far == sum(far)
    kept = [row for row, left_out in zip(mined(), far, strict=True) if not left_out]
    assert [row for row in found.indices.tolist() if min(row) >= 0] == kept


def test_an_anchor_with_fewer_candidates_has_fewer_negatives() -> None:
    anchors, candidates = vectors()
    found = mine_negatives(anchors[:2], candidates[:3], [[0], [1]], MiningOptions(n=4, relative_margin=None))
    assert (found.indices >= 0).sum(1).tolist() == [2, 2]
    assert found.scores[:, 2:].isinf().all()
