"""Classification and regression: one head reads a text, or a pair of texts, and gives a number for each label."""

import numpy as np
import torch
from torch import Tensor

from genai_pl.config.enums import Head
from genai_pl.config.labels import MULTI, REGRESSION, SINGLE, read_labels
from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.models.pooling import label_scores
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.columns import Column
from genai_pl.objectives import LabelCollator, SpecialTokens
from genai_pl.objectives.classify import (
    LOSSES,
    balanced_weights,
    confusion_matrix,
    counts_of_confusion,
    label_counts,
    macro_f1,
    moment_sums,
    pearson,
)


class ClassifyModule(BaseModule):
    """Cross entropy of one label, binary cross entropy of several, or squared error of numbers, by the labels of the data.

    class_weights: None, balanced, or a weight for each label in their order
    """

    shapes = ("decoder", "encoder")
    data_kind = "labelled"
    head = Head.score
    labelled = True
    weighs_classes = True
    columns = (*BaseModule.columns, Column("train/accuracy", "accuracy", "{:8.1%}"))

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        class_weights: str | list[float] | None = None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        self.labels = read_labels(model.config.extra, model.config.n_labels)
        self.problem = self.labels.problem_type or SINGLE
        self.collator = LabelCollator(vocabulary=vocabulary)
        self.collator.types = model.config.n_token_types > 1
        self.class_weights = _checked(class_weights, self.problem, len(self.labels.names))
        self.weights: Tensor | None = None  # (n_labels,), from use_targets

    def use_targets(self, targets: np.ndarray) -> None:
        """Weigh the classes as the option says. targets: of all training rows, (N, 1 or n_labels)."""
        if self.class_weights is None:
            return
        weights = self.class_weights
        if weights == "balanced":
            weights = balanced_weights(torch.from_numpy(targets), self.problem, len(self.labels.names))
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        if self.problem == SINGLE:
            # a weighted mean does not depend on their scale, and a step's targets are then at least 1
            self.weights = self.weights / self.weights[self.weights > 0].min()
            self.collator.class_weights = self.weights

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {**({"query": "some first text"} if self.labels.pairs else {}), "prompt": text, "score": True}

    def step(self, batch: Batch) -> Metrics:
        """The loss summed over rows, and counts from which the metrics follow."""
        types = {"token_type_ids": batch["token_type_ids"]} if "token_type_ids" in batch else {}
        logits = label_scores(self.model, batch["input_ids"], batch["segment_ids"], 1, **types)[:, 0]  # (B, K)
        weights = None if self.weights is None else self.weights.to(logits.device)
        loss = LOSSES[self.problem](logits, batch["labels"], weights)
        return {"loss": loss, **self._counts(logits.detach(), batch["labels"])}

    @torch.no_grad()
    def _counts(self, logits: Tensor, labels: Tensor) -> Metrics:
        rows = torch.tensor(float(len(labels)), device=labels.device)
        if self.problem == REGRESSION:
            error = (logits - labels).square().mean(1).sum()
            return {"rows": rows, "mse": error, "moments": moment_sums(logits, labels)}
        if self.problem == MULTI:
            predicted = logits > 0  # a probability above one half
            hits = (predicted == labels.bool()).all(1).sum()
            return {"rows": rows, "accuracy": hits, "counts": label_counts(predicted, labels)}
        predicted, true = logits.argmax(1), labels[:, 0].long()
        confusion = confusion_matrix(predicted, true, logits.shape[1])
        return {"rows": rows, "accuracy": (predicted == true).sum(), "confusion": confusion}

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Loss per target, accuracy (all labels of a row right) or squared error per row, macro F1 or correlation."""
        metrics = {"loss": sums["loss"] / targets}
        metrics |= {name: sums[name] / sums["rows"] for name in ("accuracy", "mse") if name in sums}
        if self.problem == REGRESSION:
            return {**metrics, "pearson": pearson(sums["moments"])}
        if self.problem == SINGLE:
            self.confusion = sums["confusion"]
            return {**metrics, "f1": macro_f1(counts_of_confusion(sums["confusion"]))}
        return {**metrics, "f1": macro_f1(sums["counts"])}


def _checked(weights: str | list[float] | None, problem: str, n_labels: int) -> str | list[float] | None:
    """The option class_weights; ConfigError for one that does not fit the labels."""
    if weights is None or (weights == "balanced" and problem != REGRESSION):
        return weights
    if problem == REGRESSION:
        raise ConfigError(f"objective.class_weights={weights}: a regression has no classes; leave it out")
    if isinstance(weights, str):
        raise ConfigError(f"objective.class_weights={weights} is neither balanced nor a list of numbers")
    if len(weights) != n_labels:
        raise ConfigError(f"objective.class_weights has {len(weights)} numbers for {n_labels} labels")
    if any(isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0 for weight in weights):
        raise ConfigError(f"objective.class_weights={list(weights)}: each must be a number, at least 0")
    if not any(weights):
        raise ConfigError(f"objective.class_weights={list(weights)}: one of them must be above 0")
    return [float(weight) for weight in weights]
