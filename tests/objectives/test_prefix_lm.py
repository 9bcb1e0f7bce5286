"""Prefix language modelling: where the prefix ends and what is predicted."""

import torch

from genai_pl.kernels import AttentionMask
from genai_pl.objectives import IGNORED, CausalLMCollator, PrefixLMCollator
from tests.objectives.packed_rows import VOCABULARY, row, rows

COLLATE = PrefixLMCollator(vocabulary=VOCABULARY, seed=0)
CAUSAL = CausalLMCollator(vocabulary=VOCABULARY, seed=0)


def test_every_prefix_length_from_one_to_all_but_one_token_is_as_likely() -> None:
    prefix = COLLATE(rows(5000, 11))["prefix"]
    lengths, counts = prefix.unique(return_counts=True)
    assert lengths.tolist() == list(range(1, 11))
    assert (counts - 500).abs().max() < 5 * (5000 * 0.09) ** 0.5


def test_only_tokens_after_the_prefix_are_predicted_and_the_prefix_sees_none_of_them() -> None:
    given = rows(20, 17)
    batch = COLLATE(given)
    causal = CAUSAL(given)
    assert torch.equal(batch["input_ids"], causal["input_ids"])
    T = 16
    mask = AttentionMask(causal=True, prefix=batch["prefix"]).dense(T, T)[:, 0]
    for prefix, labels, all_labels, sees in zip(
        batch["prefix"].tolist(), batch["labels"], causal["labels"], mask, strict=True
    ):
        assert (labels[: prefix - 1] == IGNORED).all()
        assert torch.equal(labels[prefix - 1 :], all_labels[prefix - 1 :])
        for t in range(prefix - 1, T):
            assert not sees[t, t + 1 :].any()  # label t is token t + 1
        assert sees[:prefix, :prefix].all()
    assert batch["targets"] == sum(17 - p for p in batch["prefix"].tolist())


def test_the_prefix_lies_within_the_first_document_and_later_documents_are_causal() -> None:
    given = [row(40, index, documents=(9, 20)) for index in range(200)]
    batch, causal = COLLATE(given), CAUSAL(given)
    assert batch["prefix"].min() == 1
    assert batch["prefix"].max() == 8
    assert torch.equal(batch["labels"][:, 9:], causal["labels"][:, 9:])
    assert torch.equal(batch["segment_ids"], causal["segment_ids"])
    mask = AttentionMask(causal=True, prefix=batch["prefix"], segments=batch["segment_ids"]).dense(39, 39)[:, 0]
    assert torch.equal(mask[:, 9:, 9:], mask[:, 9:, 9:].tril())
    assert not mask[:, 9:, :9].any()


def test_a_first_document_of_one_token_has_nothing_to_predict() -> None:
    given = [row(8, documents=(1,))]
    batch, causal = COLLATE(given), CAUSAL(given)
    assert batch["prefix"].tolist() == [1]
    assert torch.equal(batch["labels"], causal["labels"])
