"""KTO: learning from single completions with a label desirable or not."""

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.columns import Column
from genai_pl.modules.preference import completion_logprobs
from genai_pl.modules.reference import Reference
from genai_pl.objectives import SpecialTokens, UnpairedPreferenceCollator, kto_loss


class KTOModule(BaseModule):
    """Gains and losses of completions relative to a reference point (Ethayarajh et al. 2024, section 4).

    The reference point is the mean log-ratio of mismatched completions, prompt i with completion i + 1, which
    estimates the KL divergence of the policy from its reference; it carries no gradient.

    beta: inverse temperature
    desirable_weight, undesirable_weight: weights of the two kinds, to balance their numbers
    """

    shapes = ("decoder",)
    data_kind = "unpaired"
    divides_sequences = True
    columns = (
        *BaseModule.columns,
        Column("rewards/margins", "margin", "{:8.4f}"),
        Column("train/kl", "KL", "{:8.4f}"),
    )

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if not beta > 0:
            raise ConfigError(f"objective.beta must be above 0, not {beta}")
        self.collator = UnpairedPreferenceCollator(vocabulary=vocabulary, seed=seed)
        self.beta = beta
        self.weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self.reference = Reference(model)

    def step(self, batch: Batch) -> Metrics:
        """Sums over completions of the loss, their implicit rewards, and the reference point."""
        desirable = batch["desirable"]
        B = len(desirable)
        # the second half of the rows holds the mismatched completions
        own, mismatched = ({k: x[rows] for k, x in _texts(batch).items()} for rows in (slice(B), slice(B, None)))
        ratios = self._ratios(own)
        with torch.no_grad():
            kl = self._mean(self._ratios(mismatched)).clamp(min=0)
        options = {"beta": self.beta, **self.weights}
        loss = kto_loss(ratios, desirable, kl, **options)
        by_source = self.losses_of_rows(batch, lambda rows: kto_loss(ratios[rows], desirable[rows], kl, **options))
        rewards = self.beta * ratios.detach()
        return {
            "loss": loss,
            "rewards/chosen": rewards[desirable].sum(),
            "rewards/rejected": rewards[~desirable].sum(),
            "kl": kl * B,
            "desirable": desirable.sum().float(),
            **by_source,
        }

    def summarize(self, sums: Metrics, targets: Tensor) -> Metrics:
        """Means over all completions; rewards over the desirable, and over the undesirable ones."""
        n = sums["desirable"]
        chosen = sums["rewards/chosen"] / n.clamp(min=1)
        rejected = sums["rewards/rejected"] / (targets - n).clamp(min=1)
        means = {"loss": sums["loss"] / targets, "kl": sums["kl"] / targets}
        return {**means, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}

    def _ratios(self, batch: Batch) -> Tensor:
        """Log-probability of each completion under the policy minus that under the reference, (B,)."""
        policy = completion_logprobs(self.model, batch, 1)[:, 0]
        with self.reference.of(self.model) as model:
            reference = completion_logprobs(model, batch, 1)[:, 0]
        return policy - reference

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the values of all ranks."""
        return self._over_ranks(values.sum()) / self._over_ranks(values.new_tensor(len(values)))


def _texts(batch: Batch) -> Batch:
    return {name: batch[name] for name in ("input_ids", "labels", "segment_ids")}
