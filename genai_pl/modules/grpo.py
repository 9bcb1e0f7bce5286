"""Group-relative policy optimization: GRPO, Dr. GRPO and RLOO.

Each prompt has a group of completions, and the advantage of one is its score against those of its group, the same for
all its tokens. The published variants differ in three options: what the score is compared with, whether advantages are
divided by their standard deviation, and how the loss is normalized. The losses are in `objectives/grpo.py`.
"""

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.modules.base import Metrics
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.modules.preference import token_logprobs
from genai_pl.modules.rollout import Experience, Rollout, gather_tokens
from genai_pl.modules.rollout_module import Means
from genai_pl.objectives.grpo import completion_weights, group_advantages, grpo_loss, rloo_advantages
from genai_pl.objectives.ppo import clipped_surrogate, kl_estimate, policy_metrics

ADVANTAGES = ("group", "rloo")


class GRPOModule(PolicyGradientModule):
    """Clipped policy gradient on advantages within groups, without a value model (Shao et al. 2024).

    beta: coefficient of the KL penalty to the reference inside the loss (0: none)
    clip_range, clip_range_high: the ratio new / old is clipped to [1 - clip_range, 1 + clip_range_high]; None:
        symmetric
    advantage: group (score minus the group's mean) or rloo (minus the mean of the others)
    scale: std (advantages are divided by the standard deviation of the group's scores) or none (Dr. GRPO)
    normalization: of the loss over tokens: sequence (GRPO), token (DAPO) or constant (Dr. GRPO)
    """

    def __init__(
        self,
        *args: object,
        beta: float,
        clip_range: float,
        clip_range_high: float | None,
        advantage: str,
        scale: str,
        normalization: str,
        **options: object,
    ) -> None:
        super().__init__(*args, **options)
        if advantage not in ADVANTAGES:
            raise ConfigError(f"objective.advantage={advantage} is not one of {', '.join(ADVANTAGES)}")
        if self.group_size < 2:
            raise ConfigError("objective.group_size must be at least 2: completions are compared with each other")
        self.beta, self.clip = beta, {"clip_range": clip_range, "clip_range_high": clip_range_high}
        self.advantage, self.scale, self.normalization = advantage, scale, normalization

    def make_experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, Means]:
        """Advantages (N,) of completions within their groups, and log-probabilities under old policy and reference."""
        outputs = self.rollout_logprobs(rollout)
        old_logprobs, reference_logprobs = outputs["old_logprobs"], outputs["reference_logprobs"]
        # one advantage per completion, from the scores of its group
        if self.advantage == "rloo":
            advantages = rloo_advantages(scores, self.group_size)
        else:
            advantages = group_advantages(scores, self.group_size, scale=self.scale)
        # metrics
        mask = rollout.mask
        kl = torch.where(mask, kl_estimate(old_logprobs, reference_logprobs, "k3"), 0).sum(1)
        means = self.describe(rollout, scores, kl, outputs["entropy"])
        means["objective/rlhf_reward"] = (scores - self.beta * kl).nansum(), (~scores.isnan()).sum()
        groups = advantages.view(-1, self.group_size)
        means["objective/equal_groups"] = (groups == 0).all(1).sum(), len(groups)  # all advantages 0: no gradient
        experience = {
            "token_positions": rollout.token_positions,
            "mask": mask,
            "old_logprobs": old_logprobs,
            "reference_logprobs": reference_logprobs,
            "advantages": advantages,
            "kl": kl,
        }
        return {**rollout.batch, **experience}, means

    def loss_normalizer(self, minibatch: Experience) -> Tensor:
        return self._weights(minibatch["mask"])[1]

    def _weights(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of tokens (N, L) in the loss, and the number by which their sum is divided."""
        return completion_weights(
            mask, normalization=self.normalization, length=self.sampling.max_new_tokens * self.max_turns
        )

    def loss(self, minibatch: Experience) -> tuple[Tensor, Metrics]:
        """The clipped surrogate of some rows, with the KL penalty inside, as a weighted sum over tokens."""
        logprobs = gather_tokens(token_logprobs(self.model, minibatch), minibatch["token_positions"])
        mask, old_logprobs, advantages = minibatch["mask"], minibatch["old_logprobs"], minibatch["advantages"]
        weights, _ = self._weights(mask)
        kl = {"reference_logprobs": minibatch["reference_logprobs"], "beta": self.beta} if self.beta else {}
        loss = grpo_loss(logprobs, old_logprobs, advantages, weights, **self.clip, **kl)
        arguments = (logprobs.detach(), old_logprobs, advantages[:, None], mask)
        policy = clipped_surrogate(*arguments, **self.clip).sum()
        return loss, policy_metrics(*arguments, **self.clip) | {"loss/policy": policy}
