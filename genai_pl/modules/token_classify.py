"""Token classification: the head gives every token a number for each tag, and the first token of a word is its word's."""

import torch
import torch.nn.functional as F

from genai_pl.config.enums import Head
from genai_pl.config.labels import read_labels
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.columns import Column
from genai_pl.objectives import IGNORED, SpecialTokens, TagCollator
from genai_pl.objectives.token_classify import entity_counts, f1_of


class TokenClassifyModule(BaseModule):
    """Cross entropy of the tags of words; validation counts entities that are found exactly, as seqeval does."""

    shapes = ("decoder", "encoder")
    data_kind = "tags"
    head = Head.tokens
    labelled = True
    columns = (*BaseModule.columns, Column("train/accuracy", "accuracy", "{:8.1%}"))

    def __init__(
        self, model: Model, *, vocabulary: SpecialTokens, seed: int, optimizer: object, schedule: object
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        self.labels = read_labels(model.config.extra, model.config.n_labels)
        self.collator = TagCollator(vocabulary=vocabulary)

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {"prompt": text, "score": True}

    def step(self, batch: Batch) -> Metrics:
        """Cross entropy and correct tags, summed over words; in validation also the entities."""
        hidden = self.model.features(batch["input_ids"], batch["segment_ids"])
        is_word = batch["labels"] != IGNORED
        logits, true = self.model.label_logits(hidden[is_word]).float(), batch["labels"][is_word]  # (N, K), (N,)
        predicted = logits.detach().argmax(-1)
        sums = {"loss": F.cross_entropy(logits, true, reduction="sum"), "accuracy": (predicted == true).sum()}
        if not self.training:
            sums["entities"] = self._entities(predicted, true, is_word.sum(1))
        return sums

    def _entities(self, predicted: torch.Tensor, true: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """(3,) entities found, predicted and true; the words of row n are sizes[n] of the (N,) tags."""
        total, names, sizes = torch.zeros(3, device=true.device), self.labels.names, sizes.tolist()
        for ours, theirs in zip(predicted.split(sizes), true.split(sizes), strict=True):
            tags = ([names[n] for n in ids.tolist()] for ids in (ours, theirs))
            total += torch.from_numpy(entity_counts(*tags)).to(total)
        return total

    def summarize(self, sums: Metrics, targets: torch.Tensor) -> Metrics:
        """Loss and accuracy per word; precision, recall and F1 of entities in validation."""
        metrics = {name: sums[name] / targets for name in ("loss", "accuracy")}
        return metrics | (f1_of(*sums["entities"].unbind()) if "entities" in sums else {})
