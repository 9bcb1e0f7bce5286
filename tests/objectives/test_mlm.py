"""Masked language modelling: the shares of BERT, counted over many rows."""

import numpy as np
import pytest
import torch

from genai_pl.objectives import IGNORED, MaskedLMCollator
from tests.objectives.packed_rows import END, MASK, TEXT, VOCABULARY, row, rows


def originals(batch_of_rows: list[dict]) -> torch.Tensor:
    return torch.from_numpy(np.stack([r["input_ids"] for r in batch_of_rows]))


def test_fifteen_percent_are_targets_of_which_eighty_ten_ten_percent_are_masked_random_and_kept() -> None:
    given = rows(300, 512)
    batch = MaskedLMCollator(vocabulary=VOCABULARY, seed=0)(given)
    chosen = batch["labels"] != IGNORED
    assert (chosen.sum(1) == 77).all()  # 0.15 * 512 = 76.8
    assert torch.equal(batch["labels"][chosen], originals(given)[chosen])
    assert torch.equal(batch["input_ids"][~chosen], originals(given)[~chosen])

    seen, original = batch["input_ids"][chosen], batch["labels"][chosen]
    n = len(seen)
    masked = (seen == MASK).sum().item()
    kept = (seen == original).sum().item()
    for count, share in ((masked, 0.8), (kept, 0.1 + 0.1 / TEXT), (n - masked - kept, 0.1 - 0.1 / TEXT)):
        assert abs(count - share * n) < 5 * (n * share * (1 - share)) ** 0.5

    random = seen[(seen != MASK) & (seen != original)]
    assert random.max() < TEXT
    per_bin = torch.histc(random.float(), bins=8, min=0, max=TEXT)  # uniform: chi square with 7 degrees of freedom
    assert ((per_bin - len(random) / 8) ** 2 / (len(random) / 8)).sum() < 30


def test_every_position_is_chosen_as_often() -> None:
    counts = (MaskedLMCollator(vocabulary=VOCABULARY, seed=0)(rows(2000, 40))["labels"] != IGNORED).sum(0)
    expected, spread = 2000 * 6 / 40, (2000 * 0.15 * 0.85) ** 0.5
    assert (counts - expected).abs().max() < 5 * spread


def test_special_tokens_are_never_targets_and_a_row_has_one_target_at_least() -> None:
    given = [row(24, index, documents=(4, 4, 4, 4)) for index in range(200)]
    for whole_word in (False, True):
        batch = MaskedLMCollator(vocabulary=VOCABULARY, seed=0, mask_probability=0.5, whole_word=whole_word)(given)
        assert (batch["labels"] != END).all()
        assert (batch["input_ids"][originals(given) == END] == END).all()
    batch = MaskedLMCollator(vocabulary=VOCABULARY, seed=0)([row(3, index) for index in range(50)])
    assert ((batch["labels"] != IGNORED).sum(1) == 1).all()
    only_ends = {"input_ids": np.array([END, END]), "segment_ids": np.array([1, 2]), "key": (0, 0)}
    assert MaskedLMCollator(vocabulary=VOCABULARY, seed=0)([only_ends])["targets"] == 0


def test_whole_words_are_masked_or_not_and_fifteen_percent_of_tokens_all_the_same() -> None:
    given = rows(400, 256, documents=(100,))
    batch = MaskedLMCollator(vocabulary=VOCABULARY, seed=0, whole_word=True)(given)
    chosen = batch["labels"] != IGNORED
    for r, mask in zip(given, chosen.numpy(), strict=True):
        ids = r["input_ids"]
        inside = ~VOCABULARY.starts_word[ids] & ~VOCABULARY.special[ids]
        inside[[0, 100]] = False  # the row and the second document begin there
        assert np.array_equal(mask[1:][inside[1:]], mask[:-1][inside[1:]])
    share = chosen.float().mean(1)
    error = share.std() / 400**0.5
    assert abs(share.mean() - 0.15 * 255 / 256) < 5 * error
    assert error < 0.001


@pytest.mark.parametrize("share", [0.15, 0.4])
def test_replacement_shares_of_zero_and_one_are_exact(share: float) -> None:
    options = {"vocabulary": VOCABULARY, "seed": 0, "mask_probability": share, "replace_with_random": 0.0}
    batch = MaskedLMCollator(**options, replace_with_mask=1.0)(rows(10, 100))
    assert torch.equal(batch["input_ids"] == MASK, batch["labels"] != IGNORED)
    batch = MaskedLMCollator(**options, replace_with_mask=0.0)(rows(10, 100))
    assert torch.equal(batch["input_ids"], originals(rows(10, 100)))
