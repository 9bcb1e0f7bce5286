"""What holds for the collator of every objective."""

from functools import partial

import numpy as np
import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.objectives import (
    IGNORED,
    CausalLMCollator,
    FimCollator,
    MaskedLMCollator,
    PermutationCollator,
    PrefixLMCollator,
    SpanCorruptionCollator,
)
from tests.objectives.packed_rows import BARE, PAD, VOCABULARY, row, rows

MIXTURE = [{"noise_density": 0.15}, {"noise_density": 0.5}, {"noise_density": 0.25, "mean_span_length": None}]
NOISY = {
    "mlm": MaskedLMCollator,
    "whole_word": partial(MaskedLMCollator, whole_word=True),
    "span_corruption": SpanCorruptionCollator,
    "mixture": partial(SpanCorruptionCollator, mixture=MIXTURE),
    "permutation": PermutationCollator,
    "prefix_lm": PrefixLMCollator,
    "fim": FimCollator,
}


def collator(name: str, seed: int = 3):
    return NOISY[name](vocabulary=VOCABULARY, seed=seed)


@pytest.mark.parametrize("name", NOISY)
def test_the_noise_of_a_row_depends_on_nothing_but_seed_epoch_and_index(name: str) -> None:
    options = {"documents": (20, 31)}
    together = collator(name)(rows(5, 64, **options))
    for index in range(5):
        alone = collator(name)([row(64, index, **options)])
        for key in {*alone} - {"targets", "segment_ids", "decoder_segment_ids"}:
            expected = alone[key][0]
            found = together[key][index][: len(expected)] if expected.ndim else together[key][index]
            assert torch.equal(found, expected)
    again = [collator(name)([row(64, 1, epoch=epoch, **options)]) for epoch in range(4)]
    others = [collator(name, seed)([row(64, 1, **options)]) for seed in range(4)]
    for batches in (again, others):
        assert len({str(batch["input_ids"].tolist()) + str(batch["labels"].tolist()) for batch in batches}) > 1


@pytest.mark.parametrize("name", [*NOISY, "clm"])
def test_full_rows_fill_the_input_and_leave_no_padding(name: str) -> None:
    collate = CausalLMCollator(vocabulary=VOCABULARY, seed=0) if name == "clm" else collator(name)
    batch = collate(rows(4, collate.row_length(96)))
    if name != "mixture":
        assert batch["input_ids"].shape == (4, 96)
        assert not {"segment_ids", "decoder_segment_ids"} & batch.keys()
    assert batch["input_ids"].shape[1] <= 96
    assert batch["targets"].item() == (batch["labels"] != IGNORED).sum()
    assert batch["targets"].dtype == torch.float32
    assert all(tensor.dtype == torch.int64 for key, tensor in batch.items() if key != "targets")


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("length", [2, 3, 7])
def test_a_short_row_is_padded_and_its_padding_predicts_nothing(name: str, length: int) -> None:
    batch = collator(name)([row(60), row(length, 1)])
    padding = batch["segment_ids"] == 0
    assert padding[1].any()
    assert (batch["input_ids"][padding] == PAD).all()
    if batch["labels"].shape == padding.shape:
        assert (batch["labels"][padding] == IGNORED).all()
    if "decoder_segment_ids" in batch:
        assert ((batch["labels"] == IGNORED) == (batch["decoder_segment_ids"] == 0)).all()
    assert (batch["labels"][1] != IGNORED).any()


@pytest.mark.parametrize("name", NOISY)
def test_rows_are_read_only_and_stay_as_they_are(name: str) -> None:
    given = row(50)
    before = given["input_ids"].copy()
    collator(name)([given])
    assert np.array_equal(given["input_ids"], before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(MaskedLMCollator, vocabulary=BARE), "objective=mlm needs a mask token"),
        (partial(MaskedLMCollator, vocabulary=VOCABULARY, mask_probability=0), "mask_probability"),
        (partial(MaskedLMCollator, vocabulary=VOCABULARY, replace_with_random=0.3), "at most 1 together"),
        (
            partial(MaskedLMCollator, vocabulary=BARE._replace(mask=1), whole_word=True),
            "whole_word: no token",
        ),
        (partial(SpanCorruptionCollator, vocabulary=BARE), "objective=span_corruption needs sentinels"),
        (partial(SpanCorruptionCollator, vocabulary=BARE._replace(sentinels=(1,))), "an end-of-text token"),
        (partial(SpanCorruptionCollator, vocabulary=VOCABULARY, noise_density=1.0), "noise_density"),
        (partial(SpanCorruptionCollator, vocabulary=VOCABULARY, mean_span_length=0.5), "mean_span_length"),
        (partial(SpanCorruptionCollator, vocabulary=VOCABULARY, mixture=[{"density": 0.5}]), "density is not one of"),
        (partial(PermutationCollator, vocabulary=VOCABULARY, predict_fraction=0.0), "predict_fraction"),
        (partial(PermutationCollator, vocabulary=VOCABULARY, max_span=0), "max_span"),
        (partial(FimCollator, vocabulary=BARE), "objective=fim needs prefix, middle and suffix tokens"),
        (partial(FimCollator, vocabulary=VOCABULARY, spm_rate=2), "spm_rate"),
    ],
)
def test_what_cannot_work_is_said_with_the_option_or_the_token(build: partial, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(seed=0)
