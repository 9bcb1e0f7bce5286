"""Span corruption against the numbers of T5, and undone."""

import numpy as np
import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.objectives import IGNORED, SpanCorruptionCollator
from tests.objectives.packed_rows import END, PAD, SENTINELS, VOCABULARY, row, rows


def collator(**options) -> SpanCorruptionCollator:
    return SpanCorruptionCollator(vocabulary=VOCABULARY, seed=0, **options)


def restored(inputs: list[int], labels: list[int]) -> list[int]:
    """The text of a row: every sentinel of the input gives way to what follows it in the labels."""
    assert inputs[-1] == labels[-1] == END
    spans: dict[int, list[int]] = {}
    for token in labels[:-1]:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert list(spans) == list(SENTINELS[: len(spans)])
    assert [token for token in inputs if token in SENTINELS] == list(spans)
    return [t for token in inputs[:-1] for t in spans.get(token, [token])]


def texts(batch: dict) -> list[list[int]]:
    segments = batch.get("segment_ids", torch.ones_like(batch["input_ids"])).bool()
    return [
        restored(ids[mask].tolist(), labels[labels != IGNORED].tolist())
        for ids, mask, labels in zip(batch["input_ids"], segments, batch["labels"], strict=True)
    ]


# 512 and 114 are the lengths of T5's pretraining configurations. 256 by hand: 284 * 0.15 = 42.6, so 43 tokens are
# hidden, in 43 / 3 = 14.3, so 14 spans; 284 - 43 + 14 + 1 = 256 and 43 + 14 + 1 = 58
@pytest.mark.parametrize(("seq_len", "tokens", "targets"), [(512, 568, 114), (256, 284, 58)])
def test_lengths_are_those_of_t5(seq_len: int, tokens: int, targets: int) -> None:
    collate = collator()
    assert collate.row_length(seq_len) == tokens
    batch = collate(rows(3, tokens))
    assert batch["input_ids"].shape == (3, seq_len)
    assert batch["labels"].shape == batch["decoder_input_ids"].shape == (3, targets)
    assert "segment_ids" not in batch
    assert batch["targets"] == 3 * targets


@pytest.mark.parametrize("density", [0.1, 0.15, 0.3, 0.5])
@pytest.mark.parametrize("mean", [1.5, 2.5, 3.0, 8.0])
def test_any_input_length_is_reached_exactly(density: float, mean: float) -> None:
    collate = collator(noise_density=density, mean_span_length=mean)
    for seq_len in range(12, 120, 9):
        assert collate([row(collate.row_length(seq_len))])["input_ids"].shape[1] == seq_len


def test_input_and_target_together_are_the_text_and_the_decoder_reads_what_it_should_say_one_later() -> None:
    given = [*rows(20, 568, documents=(100, 50)), row(90, 20), row(2, 21), row(1, 22)]
    batch = collator()(given)
    assert texts(batch) == [r["input_ids"].tolist() for r in given]
    assert (batch["decoder_input_ids"][:, 0] == PAD).all()
    later = batch["labels"][:, 1:] != IGNORED
    assert torch.equal(batch["decoder_input_ids"][:, 1:][later], batch["labels"][:, :-1][later])


def test_spans_have_mean_three_and_every_division_of_the_hidden_tokens_is_as_likely() -> None:
    labels = collator()(rows(400, 568))["labels"]
    is_sentinel = torch.isin(labels, torch.tensor(SENTINELS))
    assert (is_sentinel.sum(1) == 28).all()
    lengths = []
    for row_of_labels, marks in zip(labels, is_sentinel, strict=True):
        edges = [*marks.nonzero().squeeze(-1).tolist(), len(row_of_labels) - 1]
        lengths += (np.diff(edges) - 1).tolist()
    assert sum(lengths) == 400 * 85
    # the first of 28 parts of 85 is 1 in C(83, 26) of C(84, 27) divisions, 2 in C(82, 26) of them
    n = len(lengths)
    for length, share in ((1, 27 / 84), (2, 27 / 84 * 57 / 83)):
        assert abs(lengths.count(length) - share * n) < 5 * (n * share * (1 - share)) ** 0.5


def test_hidden_tokens_stand_anywhere_but_at_the_start() -> None:
    given = rows(2000, 40)
    hidden = np.zeros(40)
    for ids, r in zip(collator(noise_density=0.25)(given)["input_ids"], given, strict=True):
        hidden += ~np.isin(r["input_ids"], ids.numpy())
    assert hidden[0] <= 2000 * 40 / 880  # the start only seems hidden never; equal tokens elsewhere blur little
    assert hidden[10:30].min() > 0.15 * 2000


def test_a_mixture_draws_each_denoiser_as_often_and_its_sequential_one_hides_the_end() -> None:
    mixture = [
        {"noise_density": 0.15, "mean_span_length": 3.0},
        {"noise_density": 0.5, "mean_span_length": 8.0},
        {"noise_density": 0.25, "mean_span_length": None},
    ]
    collate = collator(mixture=mixture)
    n = collate.row_length(128)
    given = rows(600, n)
    batch = collate(given)
    assert batch["input_ids"].shape[1] == 128
    assert texts(batch) == [r["input_ids"].tolist() for r in given]
    said = (batch["labels"] != IGNORED).sum(1)
    sizes, counts = said.unique(return_counts=True)
    assert len(sizes) == 3
    assert (counts - 200).abs().max() < 5 * (600 * 2 / 9) ** 0.5
    sequential = ((batch["labels"] == SENTINELS[1]).sum(1) == 0).nonzero().squeeze(-1)
    assert len(sequential) in counts.tolist()
    for index in sequential.tolist():
        suffix = batch["labels"][index][batch["labels"][index] != IGNORED].tolist()
        assert suffix == [SENTINELS[0], *given[index]["input_ids"][n - round(n / 4) :].tolist(), END]
    assert torch.equal(batch["decoder_segment_ids"] == 1, batch["labels"] != IGNORED)


def test_too_few_sentinels_are_an_error_that_counts_them() -> None:
    assert collator().row_length(1800) == 1999  # 300 hidden tokens, 100 spans
    with pytest.raises(ConfigError, match=r"2221 tokens have 111 spans, but the tokenizer has 100 sentinels"):
        collator().row_length(2000)
    with pytest.raises(ConfigError, match=r"have 150 spans"):
        collator()([row(3000)])
