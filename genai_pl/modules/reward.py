"""Reward models: the preferred answer to a prompt gets the higher score."""

import torch
from torch import Tensor

from genai_pl.config.enums import Head
from genai_pl.errors import ConfigError
from genai_pl.models import Model
from genai_pl.models.pooling import scores
from genai_pl.modules.base import BaseModule, Batch, Metrics
from genai_pl.modules.columns import Column
from genai_pl.modules.preference import shared_prompt_inputs, supports_shared_prompts
from genai_pl.objectives import (
    RankingCollator,
    SpecialTokens,
    centering_penalty,
    pairwise_reward_loss,
    plackett_luce_loss,
    ranking_accuracy,
    ranking_loss,
    reward_accuracy,
)

RANKING = {"pairs": ranking_loss, "plackett_luce": plackett_luce_loss}  # losses of more than two completions


class RewardModule(BaseModule):
    """One score for a prompt with its answer, trained on pairs or rankings.

    centering: coefficient of a penalty on squared scores, which keeps them near 0 (Eisenstein et al. 2023)
    ranking: loss of more than two completions: pairs (all pairs) or plackett_luce
    """

    shapes = ("decoder", "encoder")
    data_kind = "preference"
    head = Head.score
    columns = (
        *BaseModule.columns,
        Column("train/margin", "margin", "{:8.4f}"),
        Column("train/accuracy", "accuracy", "{:8.1%}"),
    )

    def __init__(
        self,
        model: Model,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        optimizer: object,
        schedule: object,
        centering: float = 0.0,
        ranking: str = "pairs",
    ) -> None:
        super().__init__(model, optimizer=optimizer, schedule=schedule)
        if ranking not in RANKING:
            raise ConfigError(f"objective.ranking={ranking} is not one of {', '.join(RANKING)}")
        self.collator = RankingCollator(vocabulary=vocabulary, seed=seed, share_prompts=supports_shared_prompts(model))
        self.centering, self.ranking = centering, RANKING[ranking]

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {"prompt": text, "score": True}

    def step(self, batch: Batch) -> Metrics:
        """Sums over pairs of the loss and its metrics; rankings of more completions go through `_ranked`."""
        if "sizes" in batch:
            return self._ranked(batch)
        chosen, rejected = self._scores(batch, 2).unbind(1)
        margin = batch.get("margin")
        loss = pairwise_reward_loss(chosen, rejected, margin=margin, centering=self.centering)
        by_source = self.losses_of_rows(
            batch,
            lambda rows: pairwise_reward_loss(
                chosen[rows], rejected[rows], margin=None if margin is None else margin[rows], centering=self.centering
            ),
        )
        difference = (chosen - rejected).detach()
        return {
            "loss": loss,
            "accuracy": reward_accuracy(chosen, rejected),
            "margin": difference.sum(),
            "rewards/chosen": chosen.detach().sum(),
            "rewards/rejected": rejected.detach().sum(),
            **by_source,
        }

    def _scores(self, batch: Batch, n: int) -> Tensor:
        return scores(self.model, batch["input_ids"], batch["segment_ids"], n, **shared_prompt_inputs(batch))

    def _ranked(self, batch: Batch) -> Metrics:
        """Sums over prompts with ranked completions, best first.

        Prompts with equally many completions go through the loss together; chosen is the best of each, rejected the
        worst.
        """
        sizes = batch["sizes"]
        all_scores = self._scores(batch, int(sizes.max()))
        by_source = self.losses_of_rows(batch, lambda rows: self._ranking_loss(all_scores[rows], sizes[rows]))
        sums: Metrics = {}
        for k in sizes.unique().tolist():
            rewards = all_scores[sizes == k, :k]  # (b, k)
            best, worst = rewards.detach()[:, 0], rewards.detach()[:, -1]
            part = {
                "accuracy": ranking_accuracy(rewards),
                "margin": (best - worst).sum(),
                "rewards/chosen": best.sum(),
                "rewards/rejected": worst.sum(),
            }
            sums = {name: sums.get(name, 0) + value for name, value in part.items()}
        return {"loss": self._ranking_loss(all_scores, sizes), **sums, **by_source}

    def _ranking_loss(self, all_scores: Tensor, sizes: Tensor) -> Tensor:
        """The loss summed over prompts, from scores (B, K) of which the first `sizes` (B,) count; 0 for none."""
        rewards_by_size = (all_scores[sizes == k, :k] for k in sizes.unique().tolist())
        losses = [self.ranking(rewards) + self.centering * centering_penalty(rewards) for rewards in rewards_by_size]
        return torch.stack(losses).sum() if losses else all_scores.sum()
