"""Policy optimization against the other completions of the same prompt: GRPO, RLOO, Dr. GRPO."""

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.modules.base import Metrics
from genai_pl.modules.policy_gradient import RLModule
from genai_pl.modules.preference import token_logprobs
from genai_pl.modules.rollout import Experience, Rollout, at_places
from genai_pl.modules.rollout_module import Means
from genai_pl.objectives.grpo import completion_weights, group_advantages, grpo_loss, rloo_advantages
from genai_pl.objectives.ppo import clipped_surrogate, kl_estimate, policy_metrics

ADVANTAGES = ("group", "rloo")


class GRPOModule(RLModule):
    """The advantage of a completion is its score against its group's; no value model (Shao et al. 2024)."""

    def __init__(
        self,
        *args: object,
        beta: float,
        clip_range: float,
        clip_range_high: float | None,
        advantage: str,
        scale: str,
        normalization: str,
        **rl: object,
    ) -> None:
        super().__init__(*args, **rl)
        if advantage not in ADVANTAGES:
            raise ConfigError(f"objective.advantage={advantage} is not one of {', '.join(ADVANTAGES)}")
        if self.group_size < 2:
            raise ConfigError("objective.group_size must be at least 2: completions are compared with each other")
        self.beta, self.clip = beta, {"clip_range": clip_range, "clip_range_high": clip_range_high}
        self.advantage, self.scale, self.normalization = advantage, scale, normalization

    def learn(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, Means]:
        found = self.read(rollout)
        old, reference = found["old"], found["reference"]
        if self.advantage == "rloo":
            advantages = rloo_advantages(scores, self.group_size)
        else:
            advantages = group_advantages(scores, self.group_size, scale=self.scale)
        mask = rollout.mask
        kl = torch.where(mask, kl_estimate(old, reference, "k3"), 0).sum(1)
        means = self.describe(rollout, scores, kl, found["entropy"])
        means["objective/rlhf_reward"] = (scores - self.beta * kl).nansum(), (~scores.isnan()).sum()
        groups = advantages.view(-1, self.group_size)
        means["objective/equal_groups"] = (groups == 0).all(1).sum(), len(groups)  # they teach nothing
        experience = {
            "places": rollout.places,
            "mask": mask,
            "old": old,
            "reference": reference,
            "advantages": advantages,
            "kl": kl,
        }
        return {**rollout.batch, **experience}, means

    def divisor(self, part: Experience) -> Tensor:
        return self._weights(part["mask"])[1]

    def _weights(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        return completion_weights(mask, normalization=self.normalization, length=self.sampling.max_new_tokens)

    def loss(self, part: Experience) -> tuple[Tensor, Metrics]:
        logprobs = at_places(token_logprobs(self.model, part), part["places"])
        mask, old, advantages = part["mask"], part["old"], part["advantages"]
        weights, _ = self._weights(mask)
        kl = {"reference_logprobs": part["reference"], "beta": self.beta} if self.beta else {}
        loss = grpo_loss(logprobs, old, advantages, weights, **self.clip, **kl)
        given = (logprobs.detach(), old, advantages[:, None], mask)
        policy = clipped_surrogate(*given, **self.clip).sum()
        return loss, policy_metrics(*given, **self.clip) | {"loss/policy": policy}
