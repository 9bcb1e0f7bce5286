"""Contrastive training of embeddings: texts of a pair come closer to each other than to all others of the batch.

Every rank embeds its own texts and gathers the positives and negatives of all ranks, so that the number of negatives
grows with the global batch. Gathering carries gradients back to the rank that made an embedding.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
GRADCACHE_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)  # others gather or split weights around a forward pass


class ContrastiveModule(BaseModule):
    """InfoNCE over the positives and negatives of all ranks; validation is recall among all validation positives.

    pooling: of hidden states to a vector, None for that of the model's folder, or mean
    temperature: of the similarities, learned (as its logarithm) with learn_temperature
    matryoshka_dims: also train these prefixes of the vector as embeddings (Kusupati et al. 2022)
    gradcache_chunk: texts whose activations exist at once; None: those of the whole batch
    """

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
        gradcache_chunk: int | None = None,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if pooling is not None and pooling not in POOLINGS:
            raise ConfigError(f"objective.pooling={pooling} is not one of {', '.join(POOLINGS)}")
        if not temperature > 0:
            raise ConfigError(f"objective.temperature must be above 0, not {temperature}")
        if gradcache_chunk is not None and gradcache_chunk < 1:
            raise ConfigError(f"objective.gradcache_chunk={gradcache_chunk} must be at least 1, or null for none")
        if gradcache_chunk is not None and model.config.n_experts:
            raise ConfigError(
                "objective.gradcache_chunk: losses of experts need the whole batch at once; set it to null"
            )
        self.gradcache_chunk = gradcache_chunk
        self.collator = PairCollator(vocabulary=vocabulary)
        self.pooling = pooling
        self.sentence = self._default_head(closes=True)
        # the logarithm is learned, so that the temperature stays above 0 (Radford et al. 2021, 2.5)
        self.temperature = temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)), requires_grad=learn_temperature)
        self.loss = matryoshka(info_nce, matryoshka_dims) if matryoshka_dims else info_nce
        self.held: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.gradcache_chunk is not None and not isinstance(self.trainer.strategy, GRADCACHE_STRATEGIES):
            raise ConfigError("objective.gradcache_chunk runs on one device or with strategy=ddp; set it to null")

    def on_train_start(self) -> None:
        super().on_train_start()
        if not self.log_temperature.requires_grad:  # the command line's counts, not the checkpoint's
            self.log_temperature.data.fill_(math.log(self.temperature))

    def _default_head(self, *, closes: bool) -> SentenceHead:
        config = self.model.config
        return default_head(self.pooling or "mean", n_embd=config.n_embd, max_length=config.max_seq_len, closes=closes)

    def use_sentence(self, head: SentenceHead | None, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Pool as the model's folder says, if it is one of sentence-transformers.

        Any other model gets the default head, and its tokenizer closes every text with an end token.
        """
        if head is None:
            append_end_token(tokenizer)
            head = self._default_head(closes=False)
        self.sentence = (head if self.pooling is None else head.with_pooling(self.pooling)).train()
        collator = self.collator
        collator.prompt, collator.max_length, collator.add_end = head.prompt, head.max_length, head.closes

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (N, D) of the texts of a batch.

        With gradcache_chunk the loss keeps the vectors alone, and each chunk of texts is embedded again in the backward pass
        (Gao et al. 2021, GradCache): its gradient is that of the whole batch, because texts do not see each other and dropout
        draws the same numbers the second time.
        """
        inputs = batch["input_ids"], batch["segment_ids"]
        if self.gradcache_chunk is None:
            return self._embed(*inputs)
        chunks = zip(*(x.split(self.gradcache_chunk) for x in inputs), strict=True)
        return torch.cat([checkpoint(self._embed, *chunk, use_reentrant=False) for chunk in chunks])

    def _embed(self, input_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Embeddings (N, D) of texts (N, T)."""
        return self.sentence(self.model.features(input_ids, segment_ids), segment_ids)

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {"prompt": text, "embed": True}

    def step(self, batch: Batch) -> Metrics:
        """InfoNCE summed over the anchors of this rank, and the temperature."""
        B = int(batch["targets"])
        # embeddings of this rank; in validation they are also kept for the recall
        anchors, positives, *negatives = self.embed(batch).split(B)
        own, other = batch["text_ids"][:B], batch["text_ids"][B:]
        if not self.training:
            self.held.append((anchors, positives, own, batch["anchor_ids"]))
        temperature = self.log_temperature.exp()
        # rank r compares its anchors with the positives of all ranks: its own begin at r * B
        candidates = self._everywhere(positives), self._everywhere(negatives[0]) if negatives else None
        info_nce_of = partial(
            self.loss,
            anchors,
            *candidates,
            temperature=temperature,
            offset=self.global_rank * B if self.training else 0,
            text_ids=torch.cat([self._everywhere(ids) for ids in (own, other) if len(ids)]),
            anchor_ids=batch["anchor_ids"],
        )
        by_source = self.losses_of_rows(batch, lambda rows: info_nce_of(rows=rows))
        return {"loss": info_nce_of(), "temperature": temperature.detach() * B, **by_source}

    def _everywhere(self, x: Tensor) -> Tensor:
        """x of all ranks, in rank order; in validation, where ranks may have unequal batches, x of this rank."""
        if self.trainer.world_size == 1 or not self.training:
            return x
        return self.all_gather(x, sync_grads=x.is_floating_point()).flatten(0, 1)

    def named_parameters_for_optimizer(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters, the temperature, and those of the pooling head."""
        yield from super().named_parameters_for_optimizer()
        yield "log_temperature", self.log_temperature
        yield from self.sentence.named_parameters("sentence")

    def epoch_metrics(self) -> Metrics:
        """Recall@k: the share of anchors whose own positive is among the k nearest of all validation positives."""
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
        """sentence-transformers' files beside the model, which say how a text becomes one vector."""
        return {**self.sentence.files, **dict(self.sentence.tensors())}
