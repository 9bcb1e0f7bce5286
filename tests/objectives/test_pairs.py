"""Pairs of texts in one batch."""

import numpy as np
import pytest
import torch

from genai_pl.errors import DataError
from genai_pl.objectives import PairCollator
from tests.objectives.packed_rows import PAD, VOCABULARY

COLLATE = PairCollator(vocabulary=VOCABULARY)


def text(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def test_anchors_positives_and_negatives_stand_below_each_other() -> None:
    batch = COLLATE(
        [
            {"anchor": text(1, 2), "positive": text(3), "negative": text(4, 5, 6)},
            {"anchor": text(7), "positive": text(8, 9), "negative": text(3)},
        ]
    )
    lines = [[1, 2, PAD], [7, PAD, PAD], [3, PAD, PAD], [8, 9, PAD], [4, 5, 6], [3, PAD, PAD]]
    assert batch["input_ids"].tolist() == lines
    assert batch["segment_ids"].tolist() == [[int(token != PAD) for token in line] for line in lines]
    assert batch["targets"] == 2
    ids = batch["text_ids"].tolist()  # of both positives, then both negatives
    assert len(ids) == 4
    assert ids[0] == ids[3]
    assert len(set(ids)) == 3


def test_an_anchor_without_positive_is_its_own() -> None:
    batch = COLLATE([{"anchor": text(1, 2)}, {"anchor": text(5)}])
    assert torch.equal(batch["input_ids"][:2], batch["input_ids"][2:])
    assert batch["targets"] == 2


def test_a_negative_for_some_rows_only_is_an_error() -> None:
    with pytest.raises(DataError, match="1 of 2 rows have a negative"):
        COLLATE([{"anchor": text(1), "negative": text(2)}, {"anchor": text(3)}])


def test_anchors_are_told_from_candidates_by_their_text() -> None:
    batch = COLLATE([{"anchor": text(1, 2), "positive": text(3)}, {"anchor": text(3), "positive": text(1, 2)}])
    assert batch["anchor_ids"].tolist() == batch["text_ids"].flip(0).tolist()
