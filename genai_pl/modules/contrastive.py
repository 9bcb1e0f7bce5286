"""Training embeddings: texts that belong together come closer than all others of the batch."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.models.pooling import POOLINGS, pool
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.names import Head
from genai_pl.objectives import PairCollator, Vocabulary, info_nce, matryoshka, recall_at_k

RECALLS = (1, 5, 10)


class ContrastiveModule(BaseModule):
    """InfoNCE over the positives and negatives of all processes; validation is recall among all held positives."""

    shapes = ("encoder", "decoder")
    data_kind = "pairs"
    head = Head.none

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: Vocabulary,
        seed: int,
        optimizer: object,
        schedule: object,
        pooling: str = "mean",
        temperature: float = 0.05,
        learn_temperature: bool = False,
        matryoshka_dims: list[int] | None = None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if pooling not in POOLINGS:
            raise ConfigError(f"objective.pooling={pooling} is not one of {', '.join(POOLINGS)}")
        if not temperature > 0:
            raise ConfigError(f"objective.temperature must be above 0, not {temperature}")
        self.collator = PairCollator(vocabulary=vocabulary)
        self.pooling = pooling
        # its logarithm is learned, so that it stays above 0 (Radford et al. 2021, 2.5)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)
        self.loss = matryoshka(info_nce, matryoshka_dims) if matryoshka_dims else info_nce
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (N, C) of the texts of a batch."""
        hidden = self.model.features(batch["input_ids"], batch["segment_ids"])
        return pool(hidden, batch["segment_ids"], self.pooling)

    def step(self, batch: Batch) -> Metrics:
        B = int(batch["targets"])
        anchors, positives, *negatives = self.embed(batch).split(B)
        own, other = batch["text_ids"][:B], batch["text_ids"][B:]
        if not self.training:
            self.held.append((anchors, positives, own))
        temperature = self.log_temperature.exp()
        loss = self.loss(
            anchors,
            self._everywhere(positives),
            self._everywhere(negatives[0]) if negatives else None,
            temperature=temperature,
            offset=self.global_rank * B if self.training else 0,
            text_ids=torch.cat([self._everywhere(ids) for ids in (own, other) if len(ids)]),
        )
        return {"loss": loss, "temperature": temperature.detach() * B}

    def _everywhere(self, x: Tensor) -> Tensor:
        """Of all processes, in the order of their ranks; in validation they may have unequal numbers, and keep theirs."""
        if self.trainer.world_size == 1 or not self.training:
            return x
        return self.all_gather(x, sync_grads=x.is_floating_point()).flatten(0, 1)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().trained()
        yield "log_temperature", self.log_temperature

    def held_metrics(self) -> Metrics:
        """Recall@k: the share of held anchors that find their own among the k nearest of all held positives."""
        parts = [tuple(x.cpu() for x in batch) for batch in self.held]
        self.held = []
        if self.trainer.world_size > 1:
            gathered: list[list] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, parts)
            parts = [batch for rank in gathered for batch in rank]
        anchors, positives, ids = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return {f"recall@{k}": recall_at_k(anchors, positives, k, text_ids=ids) / len(anchors) for k in RECALLS}

    def export_files(self) -> dict[str, object]:
        """What sentence-transformers reads beside the model: how a text becomes one vector."""
        places = {"mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken", "cls": "pooling_mode_cls_token"}
        modes = {key: kind == self.pooling for kind, key in places.items()}
        kinds = (("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize"))
        modules = [
            {"idx": int(n), "name": n, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for n, path, kind in kinds
        ]
        config = self.model.config
        return {
            "modules.json": modules,
            "sentence_bert_config.json": {"max_seq_length": config.max_seq_len, "do_lower_case": False},
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
            "1_Pooling/config.json": {"word_embedding_dimension": config.n_embd, **modes},
        }
