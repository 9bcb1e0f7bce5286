"""Pretraining and fine-tuning by next-token prediction."""

import math

import torch
from torch import Tensor

from genai_pl.models import Decoder
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.objectives import IGNORED, CausalLMCollator, causal_lm_loss


class CausalLMModule(BaseModule):
    """A decoder trained on the negative log-likelihood of every token given those before it."""

    shapes = ("decoder",)

    def __init__(
        self,
        model: Decoder,
        *,
        token_bytes: list[int],
        pad_token_id: int,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **training,
    ) -> None:
        super().__init__(model, **training)
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.collator = CausalLMCollator(pad_token_id)
        self.register_buffer("token_bytes", torch.tensor(token_bytes), persistent=False)

    def step(self, batch: Batch) -> Metrics:
        labels = batch["labels"]
        hidden = self.model.features(batch["input_ids"], batch.get("segment_ids"))
        loss = causal_lm_loss(
            hidden,
            self.model.lm_head.weight,
            labels,
            softcap=self.model.config.logit_softcap,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )
        return {"loss": loss, "bytes": self.token_bytes[labels[labels != IGNORED]].sum()}

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Loss in nats per token, perplexity, and bits per byte of text, which does not depend on the tokenizer."""
        loss = sums["loss"] / targets
        return {"loss": loss, "perplexity": loss.exp(), "bpb": sums["loss"] / (math.log(2) * sums["bytes"])}
