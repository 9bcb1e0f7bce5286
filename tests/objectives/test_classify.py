"""Losses and metrics of classification against torch's and scikit-learn's definitions, label cells, and collation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_f1_score, multilabel_f1_score
from torchmetrics.functional.regression import pearson_corrcoef

from genai_pl.config.labels import MULTI, REGRESSION, SINGLE, Labels
from genai_pl.data.columns import Place
from genai_pl.data.labels import encode_label, find_labels, parse_label_cell
from genai_pl.errors import ConfigError, DataError
from genai_pl.objectives import LabelCollator, SpecialTokens
from genai_pl.objectives.classify import (
    balanced_weights,
    confusion_matrix,
    counts_of_confusion,
    label_counts,
    macro_f1,
    moment_sums,
    multi_label_loss,
    pearson,
    regression_loss,
    single_label_loss,
)

G = torch.Generator().manual_seed(3)
LOGITS = torch.randn(12, 4, generator=G, dtype=torch.float64)
CLASSES = torch.randint(0, 4, (12, 1), generator=G).double()
HOT = torch.randint(0, 2, (12, 4), generator=G).double()
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
HERE = Place("data.jsonl", 1, "label")


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weights"])
def test_the_losses_are_those_of_torch(weights: torch.Tensor | None) -> None:
    ids = CLASSES[:, 0].long()
    n = len(ids) if weights is None else weights[ids].sum()
    torch.testing.assert_close(single_label_loss(LOGITS, CLASSES, weights) / n, F.cross_entropy(LOGITS, ids, weights))
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=weights)(LOGITS, HOT)
    torch.testing.assert_close(multi_label_loss(LOGITS, HOT, weights) / len(HOT), expected)
    torch.testing.assert_close(regression_loss(LOGITS, HOT) / len(HOT), F.mse_loss(LOGITS, HOT))


def test_the_targets_of_a_batch_are_rows_or_the_weights_of_their_classes() -> None:
    collator = LabelCollator(vocabulary=SpecialTokens(size=10, pad=7))
    rows = [
        {"input_ids": np.array([1, 2, 3]), "target": np.array([1], np.float32), "token_type_ids": np.array([0, 1, 1])},
        {"input_ids": np.array([4]), "target": np.array([3], np.float32), "token_type_ids": np.array([0])},
    ]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (batch["targets"].item(), batch["labels"].tolist(), "token_type_ids" in batch) == (2, [[1], [3]], False)
    collator.class_weights, collator.types = WEIGHTS.float(), True
    batch = collator(rows)
    assert (batch["targets"].item(), batch["token_type_ids"].tolist()) == (4, [[0, 1, 1], [0, 0, 0]])


def test_metrics_are_those_of_torchmetrics() -> None:
    predicted, true = LOGITS.argmax(1), CLASSES[:, 0].long()
    confusion = confusion_matrix(predicted, true, 4)
    assert confusion[2, 1] == ((true == 2) & (predicted == 1)).sum()
    expected = multiclass_f1_score(predicted, true, num_classes=4, average="macro").item()
    assert macro_f1(counts_of_confusion(confusion)).item() == pytest.approx(expected)
    expected = multilabel_f1_score((LOGITS > 0).int(), HOT.int(), num_labels=4, average="macro").item()
    assert macro_f1(label_counts(LOGITS > 0, HOT)).item() == pytest.approx(expected)
    x, y = LOGITS[:, 0], HOT[:, 0] + LOGITS[:, 0]
    parts = moment_sums(x[:5], y[:5]) + moment_sums(x[5:], y[5:])
    assert pearson(parts).item() == pytest.approx(pearson_corrcoef(x, y).item())


def test_balanced_weights_let_every_class_count_as_much() -> None:
    targets = torch.tensor([[0.0], [0.0], [0.0], [2.0]])
    weights = balanced_weights(targets, SINGLE, 3)
    assert weights[0] * 3 == weights[2] * 1 == pytest.approx(4 / 3)  # n / K, as scikit-learn's "balanced"
    assert balanced_weights(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), MULTI, 2).tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["pos", "neg", "pos"], Labels(("neg", "pos"), SINGLE)),
        ([10, 2, 1], Labels(("1", "2", "10"), SINGLE)),
        (["10", "2"], Labels(("2", "10"), SINGLE)),  # a csv file
        ([True, False], Labels(("false", "true"), SINGLE)),
        ([1, 2.5], Labels(("value",), REGRESSION)),
        ([["a", "b"], [], ["c"]], Labels(("a", "b", "c"), MULTI)),
        (['["b"]', '["a", "b"]'], Labels(("a", "b"), MULTI)),
        ([[0.5, 1], [0.1, 2]], Labels(("value_0", "value_1"), REGRESSION)),
    ],
)
def test_cells_decide_what_is_learned(cells: list, expected: Labels) -> None:
    parsed = [parse_label_cell(cell, HERE) for cell in cells]
    assert find_labels(parsed, names=None, problem_type=None, known=None) == expected


def test_the_labels_of_a_model_stay_where_they_cover_the_data() -> None:
    known = Labels(("bad", "fair", "good"), SINGLE)
    options = {"names": None, "problem_type": None}
    assert find_labels(["good", "bad"], known=known, **options) == known
    assert find_labels([2, 0], known=known, **options) == known  # numbers are positions
    assert find_labels(["great", "bad"], known=known, **options).names == ("bad", "great")
    assert encode_label(known, 2) == encode_label(known, "good") == [2.0]
    assert encode_label(known._replace(problem_type=MULTI), ["good", "bad"]) == [1.0, 0.0, 1.0]
    assert encode_label(Labels(("value",), REGRESSION), "2.5") == [2.5]


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (["a", ["b"]], {}, "1 of 2 rows have lists"),
        ([[0.5, 1.0], [0.5]], {}, "rows have 1 to 2 numbers"),
        (["a"], {"problem_type": "binary"}, "data.problem_type=binary is not one of single_label"),
        ([0.5], {"names": ["a", "b"]}, "data.labels has 2 names for 1 numbers"),
        # transformers' configurations refuse a single label with one output
        (["a", "a"], {}, "only the label 'a', and one class is nothing to learn"),
        ([0], {"names": ["a"]}, "only the label 'a', and one class is nothing to learn"),
        (["a", "b"], {"names": ["a", "b", "a"]}, "data.labels names 'a' twice"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(cells: list, options: dict, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        find_labels(cells, **{"names": None, "problem_type": None, "known": None, **options})


@pytest.mark.parametrize(
    ("labels", "cell", "message"),
    [
        (Labels(("a", "b"), SINGLE), "c", "'c' is not one of the labels a, b"),
        (Labels(("a", "b"), SINGLE), ["a", "b"], "is 2 labels, and each text has one"),
        (Labels(("value",), REGRESSION), "many", "'many' is not a number"),
    ],
)
def test_a_cell_without_place_among_the_labels_is_refused(labels: Labels, cell: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_label(labels, cell)


@pytest.mark.parametrize("cell", [None, "", {"a": 1}, [["a"]], float("nan")])
def test_a_cell_that_is_no_label_is_refused(cell: object) -> None:
    with pytest.raises(DataError, match="row 1: column 'label'"):
        parse_label_cell(cell, HERE)
