"""What all objectives share that predict tokens: cross entropy, accuracy, bits per byte."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.objectives import IGNORED, Collator, SpecialTokens, masked_accuracy, token_loss


class TokenModule(BaseModule):
    """A model trained on the negative log-likelihood of labelled tokens; a subclass says from which hidden states.

    A subclass names its collator, which takes the options of the objective, and the tokens that it `needs`.
    """

    make_collator: type[Collator]

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.collator = self.make_collator(vocabulary=vocabulary, seed=seed, **options)
        self.register_buffer("n_bytes", torch.as_tensor(vocabulary.n_bytes), persistent=False)

    @abstractmethod
    def hidden(self, batch: Batch) -> Tensor:
        """Hidden states (B, T, C), each of which predicts the label (B, T) at its place."""

    def step(self, batch: Batch) -> Metrics:
        labels, model = batch["labels"], self.model
        labelled = labels != IGNORED
        hidden = self.hidden(batch)
        if self.sparse:  # what is not predicted needs no transformation before the head
            hidden, labels = hidden[labelled], labels[labelled]
        hidden, head, bias = model.to_head(hidden), model.lm_head.weight, model.lm_head.bias
        loss = token_loss(
            hidden,
            head,
            labels,
            bias=bias,
            softcap=model.config.logit_softcap,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            z_loss=self.z_loss if self.training else 0.0,
        )
        sums = {"loss": loss, "bytes": self.n_bytes[batch["labels"][labelled]].sum()}
        if not self.training:  # one product with the head more
            sums["correct"] = masked_accuracy(hidden, head, labels, bias=bias)
        return sums

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Nats per predicted token, perplexity, bits per byte of what is predicted, and in validation accuracy."""
        loss = sums["loss"] / targets
        metrics = {"loss": loss, "perplexity": loss.exp(), "bpb": sums["loss"] / (math.log(2) * sums["bytes"])}
        return metrics | ({"accuracy": sums["correct"] / targets} if "correct" in sums else {})
