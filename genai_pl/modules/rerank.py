"""Reranking: a cross-encoder learns the relevance of documents to queries, pair by pair or over the documents of a query."""

import torch

from genai_pl.config.enums import Head
from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.models.pooling import label_scores
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.columns import Column
from genai_pl.objectives import RerankCollator, SpecialTokens
from genai_pl.objectives.rerank import LOSSES, ranking_sums


class RerankModule(BaseModule):
    """One score for a query with a document; its sigmoid is the relevance.

    loss: pointwise (binary cross entropy of each pair) or listwise (softmax over the documents of a query)
    """

    shapes = ("decoder", "encoder")
    data_kind = "rerank"
    head = Head.score
    labelled = True
    columns = (*BaseModule.columns, Column("train/mrr", "mrr", "{:8.4f}"))

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        loss: str = "pointwise",
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if loss not in LOSSES:
            raise ConfigError(f"objective.loss={loss} is not one of {', '.join(LOSSES)}")
        self.loss = LOSSES[loss]
        self.collator = RerankCollator(vocabulary=vocabulary)
        self.collator.listwise = loss == "listwise"
        self.collator.types = model.config.n_token_types > 1

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {"query": text, "prompt": "some document", "score": True}

    def step(self, batch: Batch) -> Metrics:
        """The loss summed over pairs or queries, and sums of the ranks over queries."""
        types = {"token_type_ids": batch["token_type_ids"]} if "token_type_ids" in batch else {}
        scores = label_scores(self.model, batch["input_ids"], batch["segment_ids"], 1, **types)[:, 0, 0]  # (N,)
        given = batch["labels"], batch["queries"]
        with torch.no_grad():
            n, reciprocal, first = ranking_sums(scores.detach(), *given)
        return {"loss": self.loss(scores, *given), "queries": n, "mrr": reciprocal, "recall@1": first}

    def summarize(self, sums: Metrics, targets: torch.Tensor) -> Metrics:
        """Loss per target; mean reciprocal rank and recall@1 over queries with relevant and other documents."""
        n = sums["queries"].clamp(min=1)
        return {"loss": sums["loss"] / targets.clamp(min=1), **{name: sums[name] / n for name in ("mrr", "recall@1")}}
