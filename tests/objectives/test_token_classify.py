"""Entities as seqeval finds them, the words that begin at tokens, and batches of tags."""

import numpy as np
import pytest
import torch

from genai_pl.data import byte_tokenizer
from genai_pl.data.word_tokens import tokenize_words
from genai_pl.evaluation.labels import tag_metrics
from genai_pl.objectives import IGNORED, SpecialTokens, TagCollator
from genai_pl.objectives.token_classify import entities

SEQEVAL = [  # tags, and what seqeval 1.2.2's get_entities gives for them
    ("B-LOC B-PER I-LOC B-PER S-PER S-PER", "LOC00 LOC22 PER11 PER33 PER44 PER55"),
    ("S-PER E-LOC I-PER B-PER S-PER O", "LOC11 PER00 PER22 PER33 PER44"),
    ("E-LOC E-LOC O S-PER I-LOC I-PER", "LOC00 LOC11 LOC44 PER33 PER55"),
    ("B-PER E-PER O O O S-LOC", "LOC55 PER01"),
    ("O E-LOC I-PER E-LOC O S-LOC", "LOC11 LOC33 LOC55 PER22"),
    ("I-PER S-PER S-PER S-LOC I-PER E-PER", "LOC33 PER00 PER11 PER22 PER45"),
]


@pytest.mark.parametrize(("tags", "expected"), SEQEVAL)
def test_entities_are_those_of_seqeval(tags: str, expected: str) -> None:
    found = entities(tags.split())
    assert {f"{kind}{first}{last}" for kind, first, last in found} == set(expected.split())


def test_the_metrics_are_those_of_seqeval() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-LOC", "I-LOC", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["O", "I-LOC", "I-LOC", "B-PER"]]
    metrics = tag_metrics(predicted, true)
    assert [metrics[name] for name in ("precision", "recall", "f1", "accuracy")] == pytest.approx(
        [0.5, 2 / 3, 4 / 7, 5 / 8]
    )


def test_a_word_is_read_at_its_first_token() -> None:
    encoded = tokenize_words({"tokens": [["ab", "é", "c"]]}, byte_tokenizer(), 32)
    # a byte is a token; the space before a word is a token of its own and begins nothing
    assert encoded["input_ids"] == [[*b"ab \xc3\xa9 c"]]
    begins = encoded["words"][0]
    assert [word for word in begins if word >= 0] == [0, 1, 2]
    assert (begins.index(0), begins[3:5].count(1), begins.index(2)) == (0, 1, 6)
    cut = tokenize_words({"tokens": [["ab", "cd"]]}, byte_tokenizer(), 2)
    assert cut["words"] == [[0, -1]]


def test_a_batch_has_labels_where_words_begin() -> None:
    rows = [
        {"input_ids": np.array([5, 6, 7]), "labels": np.array([1, IGNORED, 0])},
        {"input_ids": np.array([8]), "labels": np.array([2])},
    ]
    batch = TagCollator(vocabulary=SpecialTokens(size=10, pad=9))(rows)
    assert batch["labels"].tolist() == [[1, IGNORED, 0], [2, IGNORED, IGNORED]]
    assert (batch["input_ids"].tolist(), batch["targets"]) == ([[5, 6, 7], [8, 9, 9]], torch.tensor(3.0))
