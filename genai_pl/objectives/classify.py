"""Classification and regression of texts: collator, losses and counts.

Losses are sums over rows; each is torch's mean loss of the same name times its number of targets (`n_targets`): rows, or
the weights of their classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.config.labels import MULTI, REGRESSION, SINGLE
from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens


class LabelCollator(Collator):
    """input_ids and segment_ids (B, T), labels (B, 1 or n_labels) and targets, of examples with `input_ids` and `target`.

    class_weights: (n_labels,) by which the rows of single labels count as targets, or None. types: whether the model reads
    token_type_ids. Both are set by the module.
    """

    class_weights: Tensor | None = None
    types: bool = False

    def __init__(self, *, vocabulary: SpecialTokens) -> None:
        self.pad = vocabulary.pad

    def __call__(self, rows: Sequence[Example]) -> Batch:
        ids = [row["input_ids"] for row in rows]
        labels = torch.from_numpy(np.stack([row["target"] for row in rows]))
        batch = {
            "input_ids": pad_rows(ids, self.pad),
            "segment_ids": pad_rows([np.ones(len(row)) for row in ids], 0),
            "labels": labels,
            "targets": torch.tensor(float(len(rows))),
        }
        if self.class_weights is not None:
            batch["targets"] = self.class_weights[labels[:, 0].long()].sum()
        if self.types and "token_type_ids" in rows[0]:
            batch["token_type_ids"] = pad_rows([row["token_type_ids"] for row in rows], 0)
        return batch


def single_label_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross entropy of logits (N, K) and classes (N, 1), summed; weights (K,) of the classes."""
    return F.cross_entropy(logits, labels[:, 0].long(), weight=weights, reduction="sum")


def multi_label_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross entropy of logits and 0 or 1 for each label, (N, K), summed over rows, mean over labels.

    weights: (K,) factors of the positive rows of each label.
    """
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="sum") / labels.shape[1]


def regression_loss(predicted: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Squared error of numbers (N, K), summed over rows, mean over numbers; there are no classes to weigh."""
    return F.mse_loss(predicted, labels, reduction="sum") / labels.shape[1]


LOSSES = {SINGLE: single_label_loss, MULTI: multi_label_loss, REGRESSION: regression_loss}


def balanced_weights(targets: Tensor, problem_type: str, n_labels: int) -> Tensor:
    """Weights (K,) that let every class count as much, of the targets (N, 1 or K) of all training rows.

    Single labels: N / (K n_k), scikit-learn's class_weight="balanced" (King and Zeng 2001); several: negatives / positives.
    """
    if problem_type == MULTI:
        positive = targets.sum(0)
        return (len(targets) - positive) / positive.clamp(min=1)
    counts = torch.bincount(targets[:, 0].long(), minlength=n_labels)
    return len(targets) / (n_labels * counts.clamp(min=1))


def confusion_matrix(predicted: Tensor, labels: Tensor, n_labels: int) -> Tensor:
    """Counts (K, K) of rows by true class (first) and predicted class, of classes (N,) and (N,)."""
    pairs = labels.long() * n_labels + predicted
    return torch.bincount(pairs, minlength=n_labels**2).view(n_labels, n_labels)


def label_counts(predicted: Tensor, labels: Tensor) -> Tensor:
    """Counts (K, 3) of true positives, false positives and false negatives of each label, of (N, K) zeros and ones."""
    predicted, labels = predicted.bool(), labels.bool()
    return torch.stack(
        [(a & b).sum(0) for a, b in ((predicted, labels), (predicted, ~labels), (~predicted, labels))], 1
    )


def counts_of_confusion(confusion: Tensor) -> Tensor:
    """`label_counts` of a confusion matrix (K, K)."""
    hits = confusion.diagonal()
    return torch.stack([hits, confusion.sum(0) - hits, confusion.sum(1) - hits], 1)


def macro_f1(counts: Tensor) -> Tensor:
    """The mean over labels of F1 = 2 tp / (2 tp + fp + fn), of counts (K, 3); labels that occur nowhere are left out."""
    counts = counts.double()
    total = 2 * counts[:, 0] + counts[:, 1] + counts[:, 2]
    present = total > 0
    return (2 * counts[:, 0] / total.clamp(min=1))[present].sum() / present.sum().clamp(min=1)


def moment_sums(x: Tensor, y: Tensor) -> Tensor:
    """(6,) float64: the number of values, and the sums of x, y, x^2, y^2 and xy, from which a correlation follows."""
    x, y = x.double().flatten(), y.double().flatten()
    return torch.stack(
        [torch.full_like(x, x.numel()).mean(), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
    )


def pearson(sums: Tensor) -> Tensor:
    """Pearson's correlation from `moment_sums`; NaN where one side is constant."""
    n, x, y, xx, yy, xy = sums.double().unbind()
    return (n * xy - x * y) / ((n * xx - x * x) * (n * yy - y * y)).clamp(min=0).sqrt()
