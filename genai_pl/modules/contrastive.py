"""Training embeddings: texts that belong together come closer than all others of the batch."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Head
from genai_pl.data.text_tokens import append_end_token
from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.models.pooling import POOLINGS
from genai_pl.models.sentence import SentenceHead, default_head
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.objectives import PairCollator, SpecialTokens, info_nce, matryoshka, recall_at_k

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECALLS = (1, 5, 10)


class ContrastiveModule(BaseModule):
    """InfoNCE over the positives and negatives of all processes; validation is recall among all held positives."""

    shapes = ("encoder", "decoder")
    data_kind = "pairs"
    head = Head.none
    embeds = True

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        pooling: str | None = None,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        matryoshka_dims: list[int] | None = None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if pooling is not None and pooling not in POOLINGS:
            raise ConfigError(f"objective.pooling={pooling} is not one of {', '.join(POOLINGS)}")
        if not temperature > 0:
            raise ConfigError(f"objective.temperature must be above 0, not {temperature}")
        self.collator = PairCollator(vocabulary=vocabulary)
        self.pooling = pooling
        self.sentence = self._default_head(closes=True)
        # its logarithm is learned, so that it stays above 0 (Radford et al. 2021, 2.5)
        self.temperature = temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)
        self.loss = matryoshka(info_nce, matryoshka_dims) if matryoshka_dims else info_nce
        self.held: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def on_train_start(self) -> None:
        super().on_train_start()
        if not self.log_temperature.requires_grad:  # a checkpoint brings that of its run; what is typed counts
            self.log_temperature.data.fill_(math.log(self.temperature))

    def _default_head(self, *, closes: bool) -> SentenceHead:
        config = self.model.config
        return default_head(self.pooling or "mean", n_embd=config.n_embd, max_length=config.max_seq_len, closes=closes)

    def use_sentence(self, head: SentenceHead | None, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Make vectors as the head of the model's folder does, if it has one; else have the tokenizer close every text."""
        if head is None:
            append_end_token(tokenizer)
            head = self._default_head(closes=False)
        self.sentence = (head if self.pooling is None else head.with_pooling(self.pooling)).train()
        collator = self.collator
        collator.prompt, collator.max_length, collator.closes = head.prompt, head.max_length, head.closes

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (N, D) of the texts of a batch."""
        hidden = self.model.features(batch["input_ids"], batch["segment_ids"])
        return self.sentence(hidden, batch["segment_ids"])

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {"prompt": text, "embed": True}

    def step(self, batch: Batch) -> Metrics:
        B = int(batch["targets"])
        anchors, positives, *negatives = self.embed(batch).split(B)
        own, other = batch["text_ids"][:B], batch["text_ids"][B:]
        if not self.training:
            self.held.append((anchors, positives, own, batch["anchor_ids"]))
        temperature = self.log_temperature.exp()
        loss = self.loss(
            anchors,
            self._everywhere(positives),
            self._everywhere(negatives[0]) if negatives else None,
            temperature=temperature,
            offset=self.global_rank * B if self.training else 0,
            text_ids=torch.cat([self._everywhere(ids) for ids in (own, other) if len(ids)]),
            anchor_ids=batch["anchor_ids"],
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
        yield from self.sentence.named_parameters("sentence")

    def epoch_metrics(self) -> Metrics:
        """Recall@k: the share of held anchors that find their own among the k nearest of all held positives."""
        parts = [tuple(x.cpu() for x in batch) for batch in self.held]
        self.held = []
        if self.trainer.world_size > 1:
            gathered: list[list] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, parts)
            parts = [batch for rank in gathered for batch in rank]
        anchors, positives, *ids = (torch.cat(columns) for columns in zip(*parts, strict=True))
        same = dict(zip(("text_ids", "anchor_ids"), ids, strict=True))
        return {f"recall@{k}": recall_at_k(anchors, positives, k, **same) / len(anchors) for k in RECALLS}

    def export_files(self) -> dict[str, object]:
        """What sentence-transformers reads beside the model: how a text becomes one vector."""
        return {**self.sentence.files, **dict(self.sentence.tensors())}
