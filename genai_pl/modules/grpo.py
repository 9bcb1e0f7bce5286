"""Policy gradients against a group of completions: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE++.

Each prompt has a group of completions, and the advantage of one is its score against those of its group or of the batch.
The published variants differ in a few options: the surrogate of the policy gradient, the advantage and its scale, the
place of the KL penalty, how the loss is normalized, and whether groups that teach nothing are sampled anew. The functions
are in `objectives/grpo.py`.
"""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.modules.base import Metrics
from genai_pl.modules.dynamic_sampling import replace_groups
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.modules.preference import token_logprobs
from genai_pl.modules.rollout import Experience, Rollout, ScoredRollout, gather_tokens, restore_order, select_rows
from genai_pl.modules.rollout_module import Means
from genai_pl.objectives.grpo import (
    SURROGATES,
    clipped_tokens,
    completion_weights,
    equal_groups,
    group_advantages,
    grpo_loss,
    process_advantages,
    reinforce_returns,
    rloo_advantages,
)
from genai_pl.objectives.ppo import kl_estimate, moment_sums, policy_metrics, whiten

CHOICES = {
    "loss": tuple(SURROGATES),
    "advantage": ("group", "rloo", "reinforce", "reinforce_baseline"),
    "scale": ("std", "batch", "none"),
    "kl": ("loss", "reward"),
    "kl_estimator": ("k2", "k3"),
    "normalization": ("sequence", "token", "constant"),
}

log = logging.getLogger(__name__)


class GRPOModule(PolicyGradientModule):
    """Policy gradient on advantages within groups or batches, without a value model.

    loss: surrogate of the gradient: grpo (clipped ratio of a token), gspo (clipped ratio of a completion, its geometric
        mean), rloo (their product) or cispo (clipped weight, no token without gradient)
    beta: coefficient of the KL penalty to the reference (0: none)
    kl: loss (a term of the loss by kl_estimator, k2 or k3) or reward (log-ratios are subtracted from scores)
    clip_range, clip_range_high: the ratio new / old is clipped to [1 - clip_range, 1 + clip_range_high]; None:
        symmetric
    advantage: group (score minus the group's mean), rloo (minus the mean of the others), reinforce (REINFORCE++: the
        return of each token, whitened over the batch) or reinforce_baseline (minus the group's mean, whitened over the batch)
    scale: of advantage=group: std (divided by the deviation of the group's scores), batch (of all scores) or none
    normalization: of the loss over tokens: sequence (GRPO), token (DAPO) or constant (Dr. GRPO)
    dynamic_sampling: rounds in which groups of equal scores are replaced by groups of other prompts (DAPO), 0: none
    """

    def __init__(
        self,
        *args: object,
        loss: str,
        beta: float,
        kl: str,
        kl_estimator: str,
        clip_range: float,
        clip_range_high: float | None,
        advantage: str,
        scale: str,
        normalization: str,
        dynamic_sampling: int,
        **options: object,
    ) -> None:
        super().__init__(*args, **options)
        chosen = {"loss": loss, "advantage": advantage, "scale": scale, "normalization": normalization}
        for name, value in {**chosen, "kl": kl, "kl_estimator": kl_estimator}.items():
            if value not in CHOICES[name]:
                raise ConfigError(f"objective.{name}={value} is not one of {', '.join(CHOICES[name])}")
        if self.group_size < 2 and (advantage != "reinforce" or dynamic_sampling):
            raise ConfigError(
                "objective.group_size must be at least 2: completions are compared with each other (not by "
                "objective.advantage=reinforce without dynamic_sampling)"
            )
        if dynamic_sampling < 0:
            raise ConfigError(f"objective.dynamic_sampling must be at least 0, not {dynamic_sampling}")
        self.beta, self.clip = beta, {"clip_range": clip_range, "clip_range_high": clip_range_high}
        self.kind, self.kl_place, self.kl_estimator = loss, kl, kl_estimator
        self.advantage, self.scale, self.normalization = advantage, scale, normalization
        self.dynamic_sampling, self.said_equal = dynamic_sampling, False
        self._measured: list[tuple[Tensor, Experience]] = []  # rows of an update that measures the policy

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.dynamic_sampling and self.source_names:
            raise ConfigError("objective.dynamic_sampling draws from one source of prompts, not from data.sources")

    def complete_rollout(self, scored: ScoredRollout, generator: torch.Generator) -> tuple[ScoredRollout, Means]:
        """The rollout after `dynamic_sampling` rounds, each of as many prompts as there are groups of equal scores.

        Further prompts are drawn from all training rows by seed, step and rank, so that a resumed run draws the same. All
        ranks go through equally many rounds. Metrics are those of all groups that were sampled.
        """
        if not self.dynamic_sampling:
            return scored, {}
        equal = equal_groups(scored.scores, self.group_size)
        n_groups = n_sampled = len(equal)
        scores, n_equal, rows = scored.scores, equal.sum(), self._further_rows()
        for _ in range(self.dynamic_sampling):
            n = int(equal.sum())
            if not self._over_ranks(equal.sum().float()):
                break
            if not n:  # other ranks sample, and may need this one's weights
                with self.unsharded_model():
                    continue
            batch = self.collate_rows([next(rows) for _ in range(n)])
            more = self.generate_and_score(batch, self.group_size, generator)
            self.record_scores(batch, more.scores)
            more_equal = equal_groups(more.scores, self.group_size)
            scored, equal = replace_groups(scored, equal, more, more_equal, pad=self.vocabulary.pad)
            scores, n_equal, n_sampled = torch.cat([scores, more.scores]), n_equal + more_equal.sum(), n_sampled + n
        return scored, {
            "objective/scores": (scores.nansum(), (~scores.isnan()).sum()),
            "objective/equal_groups": (n_equal, n_sampled),
            "objective/sampled_groups": (n_sampled, 1),
            "objective/taught_groups": (n_groups - equal.sum(), 1),
        }

    def _further_rows(self) -> Iterator[int]:
        """Numbers of training rows in an order drawn by seed, step and rank, by difficulty under a curriculum, without end."""
        n, generator = len(self.trainer.datamodule.train_rows), self.seeded_generator("cpu")
        while True:
            order = (
                torch.randperm(n, generator=generator) if self.curriculum is None else self.curriculum.order(generator)
            )
            yield from order.tolist()

    @property
    def learns_once(self) -> bool:
        """True if a rollout is one update of all its rows: the policy that learns is then the one that generated it, and is
        measured by the pass of its gradient. A KL that is part of the rewards is needed before.
        """
        return self.epochs == 1 and self.minibatch_size is None and self.beta > 0 and self.kl_place == "loss"

    def make_experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, Means]:
        """Advantages (N,) or (N, L) of completions, and log-probabilities under reference and, unless it learns once, policy."""
        mask, outputs = rollout.mask, self.rollout_logprobs(rollout, of_policy=not self.learns_once)
        reference_logprobs = outputs["reference_logprobs"]
        token_kl = torch.where(mask, outputs.get("old_logprobs", reference_logprobs) - reference_logprobs, 0)
        if rollout.step_ends is None:
            advantages = self._advantages(scores, token_kl, mask)
        else:
            advantages = self._process_advantages(rollout, scores, token_kl)
        experience = {
            **rollout.batch,
            "token_positions": rollout.token_positions,
            "mask": mask,
            "reference_logprobs": reference_logprobs,
            "advantages": advantages,
        }
        if self.learns_once:
            self._measured = []
            return {**experience, "row": torch.arange(len(rollout.batch["input_ids"]), device=mask.device)}, {}
        kl, means = self._describe(rollout, scores, outputs)
        return {**experience, "old_logprobs": outputs["old_logprobs"], "kl": kl}, means

    def describe_updates(self, scored: ScoredRollout, experience: Experience) -> tuple[Tensor, Means]:
        if "kl" in experience:
            return experience["kl"], {}
        outputs = restore_order(*zip(*self._measured, strict=True))
        outputs["reference_logprobs"] = experience["reference_logprobs"]
        return self._describe(scored.rollout, scored.scores, outputs)

    def _describe(self, rollout: Rollout, scores: Tensor, outputs: Experience) -> tuple[Tensor, Means]:
        """(KL (N,) of completions, metrics of the rollout) from log-probabilities and entropies (N, L)."""
        token_kl = kl_estimate(outputs["old_logprobs"], outputs["reference_logprobs"], "k3")
        kl = torch.where(rollout.mask, token_kl, 0).sum(1)
        means = self.describe(rollout, scores, kl, outputs["entropy"])
        means["objective/rlhf_reward"] = (scores - self.beta * kl).nansum(), (~scores.isnan()).sum()
        if self.group_size > 1:
            equal = equal_groups(scores, self.group_size)
            means["objective/equal_groups"] = equal.sum(), len(equal)  # all advantages 0: no gradient
            if rollout.step_ends is None and not scores.isnan().all() and not self.said_equal and equal.all():
                self.said_equal = True
                log.warning("reward      all completions of each prompt of a batch score the same: they teach nothing")
        return kl, means

    def _advantages(self, scores: Tensor, token_kl: Tensor, mask: Tensor) -> Tensor:
        """Advantages (N,), or (N, L) of REINFORCE++, from scores (N,) and log-ratios to the reference (N, L)."""
        beta = self.beta if self.kl_place == "reward" else 0.0
        known = ~scores.isnan()
        if self.advantage == "reinforce":
            learned = mask & known[:, None]
            returns = reinforce_returns(scores, token_kl, learned, beta=beta)
            return whiten(returns, learned, sums=self._over_ranks(moment_sums(returns, learned)))
        scores = scores - beta * token_kl.sum(1)
        if self.advantage == "rloo":
            return rloo_advantages(scores, self.group_size)
        if self.advantage == "reinforce_baseline":
            centered = group_advantages(scores, self.group_size, scale="none")
            return whiten(centered, known, sums=self._over_ranks(moment_sums(centered, known)))
        sums = self._over_ranks(moment_sums(scores, known)) if self.scale == "batch" else None
        return group_advantages(scores, self.group_size, scale=self.scale, sums=sums)

    def _process_advantages(self, rollout: Rollout, scores: Tensor, token_kl: Tensor) -> Tensor:
        """Advantages (N, L) from rewards of steps, and from what else a score has: other rewards and penalties."""
        if self.advantage != "group":
            raise ConfigError(
                f"objective.advantage={self.advantage} compares whole completions, and objective.step_rewards=dense rewards "
                "steps; set objective.advantage=group, or objective.step_rewards to min, last, mean or product"
            )
        rewards = rollout.turn_rewards
        # rounded, as the difference of equal numbers is not 0 in float32, and would be scaled up
        rest = (scores - rewards.sum(1)).round(decimals=5)
        of_steps = process_advantages(rewards, rollout.step_ends, self.group_size, scale=self.scale)
        return self._advantages(rest, token_kl, rollout.mask)[:, None] + of_steps

    def loss_normalizer(self, minibatch: Experience) -> Tensor:
        return self._weights(minibatch["mask"])[1]

    def teaching_rows(self, minibatch: Experience) -> Experience:
        """Without the rows whose completions all have the advantage 0, which would be run for a gradient of 0.

        All are kept where the loss has other terms (the KL, auxiliary losses of experts), and among several processes,
        which have to run equally many passes.
        """
        if (self.beta and self.kl_place == "loss") or self.routing.layers or self.trainer.world_size > 1:
            return minibatch
        n = len(minibatch["input_ids"])
        teaches = (minibatch["advantages"].reshape(n, -1) != 0).any(1)
        teaches[0] |= ~teaches.any()  # a pass of one row: its zeros are a gradient, and nothing would be none
        return select_rows(minibatch, teaches.nonzero()[:, 0], n)

    def _weights(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of tokens (N, L) in the loss, and the number by which their sum is divided."""
        return completion_weights(
            mask, normalization=self.normalization, length=self.sampling.max_new_tokens * self.max_turns
        )

    def loss(self, minibatch: Experience) -> tuple[Tensor, Metrics]:
        """The surrogate of some rows, with the KL penalty inside, as a weighted sum over tokens."""
        hidden, positions = self.features(minibatch), minibatch["token_positions"]
        logprobs = gather_tokens(token_logprobs(self.model, minibatch, hidden=hidden), positions)
        old_logprobs = minibatch.get("old_logprobs")
        if old_logprobs is None:  # this policy's own: every ratio is 1
            old_logprobs = logprobs.detach()
            with torch.no_grad():
                entropy = gather_tokens(self.entropy(hidden.detach(), minibatch["labels"]), positions)
            self._measured.append((minibatch["row"], {"old_logprobs": old_logprobs, "entropy": entropy}))
        mask, advantages = minibatch["mask"], minibatch["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        weights, _ = self._weights(mask)
        kl = {}
        if self.beta and self.kl_place == "loss":
            reference = minibatch["reference_logprobs"]
            kl = {"reference_logprobs": reference, "beta": self.beta, "kl_estimator": self.kl_estimator}
        surrogate = SURROGATES[self.kind]
        loss = grpo_loss(logprobs, old_logprobs, advantages, weights, surrogate=surrogate, **self.clip, **kl)
        arguments = (logprobs.detach(), old_logprobs, advantages, mask)
        metrics = policy_metrics(logprobs.detach(), old_logprobs, mask)
        metrics["policy/clipfrac"] = clipped_tokens(self.kind, *arguments, **self.clip)
        return loss, metrics | {"loss/policy": surrogate(*arguments, **self.clip).sum()}
