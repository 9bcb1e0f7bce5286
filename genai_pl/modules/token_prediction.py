"""The base of objectives that predict tokens: cross entropy, perplexity, accuracy, bits per byte.

Causal, masked, prefix, permutation and sequence-to-sequence language models differ only in the hidden states that
predict their labels (`hidden`) and in how a collator makes inputs and labels; loss and metrics are these.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from genai_pl.kernels import GroupSums
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.by_source import LOSSES, TARGETS
from genai_pl.objectives import IGNORED, Collator, SpecialTokens, masked_accuracy, token_loss


class TokenModule(BaseModule):
    """A model trained on the negative log-likelihood of labelled tokens; a subclass implements `hidden`.

    A subclass also names its collator (`make_collator`), which takes the remaining options of the objective, and the
    special tokens that it `needs`.

    vocabulary: special tokens of the tokenizer, and the bytes of each token
    seed: of what the collator draws
    label_smoothing: share of the target distribution that is uniform over the vocabulary
    z_loss: coefficient of log(Z)^2, which keeps the normalizer of the softmax near 1
    """

    make_collator: type[Collator]
    divisible = True  # whether ranks may hold parts of the layers or of the vocabulary

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
        """Hidden states (B, T, C); position t predicts label t of the batch, so collators shift labels, not models."""

    def step(self, batch: Batch) -> Metrics:
        """Sums over labelled tokens; regularizers of the loss act in training only, so validation losses compare."""
        # hidden states of positions that have a label, and their loss; logits of all positions never exist
        model, context = self.model, self.model.context_group
        n_bytes = self.n_bytes[batch["labels"][batch["labels"] != IGNORED]].sum()
        labels = context.shard(batch["labels"], IGNORED)  # of the tokens whose hidden states this rank has
        labelled = labels != IGNORED
        hidden = self.hidden(batch)
        by_source, groups = None, None
        if self.source_names:
            groups = batch["sources"][:, None].expand(labels.shape)
            groups = groups[labelled] if self.sparse else groups
            by_source = GroupSums(groups, labels.new_zeros(len(self.source_names), dtype=torch.float32))
        if self.sparse:  # a masked LM predicts 15 % of the positions: the head need not see the others
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
            by_group=by_source,
        )
        # sums for the logs: bytes of the predicted tokens, and in validation how many were predicted exactly
        sums = {"loss": context.total(loss), "bytes": n_bytes}
        if not self.training:  # costs a second product with the head
            sums["correct"] = context.total(masked_accuracy(hidden, head, labels, bias=bias))
        if by_source is not None:
            counts = torch.zeros_like(by_source.sums)
            counts.index_add_(0, groups.reshape(-1), (labels != IGNORED).reshape(-1).to(counts))
            sums |= {LOSSES: context.total(by_source.sums), TARGETS: context.total(counts)}
        return sums

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Loss in nats per target, perplexity, bits per byte of the predicted text, and accuracy where it was counted.

        Bits per byte compare models with different tokenizers: loss / (ln 2 * bytes of the predicted tokens).
        """
        loss = sums["loss"] / targets
        metrics = {"loss": loss, "perplexity": loss.exp(), "bpb": sums["loss"] / (math.log(2) * sums["bytes"])}
        return metrics | ({"accuracy": sums["correct"] / targets} if "correct" in sums else {})
