"""Proximal policy optimization with a value head on the policy's own hidden states."""

import torch
from torch import Tensor, nn

from genai_pl.modules.base import Metrics
from genai_pl.modules.preference import token_logprobs
from genai_pl.modules.rl import Experience, RLModule
from genai_pl.modules.rollout import Rollout
from genai_pl.objectives.ppo import (
    adapt_kl_coef,
    gae,
    kl_estimate,
    kl_rewards,
    moment_sums,
    policy_loss,
    policy_metrics,
    token_entropy,
    value_loss,
    whiten,
)


class PPOModule(RLModule):
    """Clipped policy and value losses on advantages of rewards that pay for distance to the reference (Ziegler et al. 2019)."""

    def __init__(
        self,
        *args: object,
        kl_coef: float,
        kl_target: float | None,
        kl_horizon: float,
        kl_estimator: str,
        gamma: float,
        gae_lambda: float,
        clip_range: float,
        value_clip_range: float,
        value_coef: float,
        **rl: object,
    ) -> None:
        super().__init__(*args, group_size=1, **rl)
        self.register_buffer("kl_coef", torch.tensor(kl_coef))
        self.kl_target, self.kl_horizon, self.kl_estimator = kl_target, kl_horizon, kl_estimator
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip_range, self.value_clip_range, self.value_coef = clip_range, value_clip_range, value_coef
        self.value_head = nn.Linear(self.model.config.n_embd, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def trained(self):
        yield from super().trained()
        yield from self.value_head.named_parameters(prefix="value_head")

    def learn(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, Metrics]:
        mask = rollout.mask
        with torch.no_grad():
            hidden = self.model.features(rollout.batch["input_ids"], rollout.batch["segment_ids"])
            values = torch.where(mask, self.value_head(hidden).squeeze(-1).float(), 0)
        old, reference = self.logprobs(rollout, hidden=hidden)
        kl = torch.where(mask, kl_estimate(old, reference, self.kl_estimator), 0)
        rewards = kl_rewards(scores, kl, mask, kl_coef=float(self.kl_coef))
        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
        advantages = whiten(advantages, mask, sums=self._over_ranks(moment_sums(advantages, mask)))
        means = {
            "objective/scores": scores.mean(),
            "objective/kl": kl.sum(1).mean(),
            "objective/rlhf_reward": rewards.sum(1).mean(),
            "objective/entropy": self._entropy(hidden, rollout),
            "objective/kl_coef": self.kl_coef.clone(),
            "objective/response_length": mask.sum(1).float().mean(),
            "objective/ended": rollout.ended.float().mean(),
        }
        self._adapt(means["objective/kl"], len(scores))
        experience = {"old": old, "values": values, "advantages": advantages, "returns": returns, "mask": mask}
        return {**rollout.batch, **experience}, means

    def _entropy(self, hidden: Tensor, rollout: Rollout) -> Tensor:
        head, model = self.model.lm_head, self.model
        options = {"bias": head.bias, "softcap": model.config.logit_softcap}
        entropy = token_entropy(model.to_head(hidden), head.weight, rollout.batch["labels"], **options)
        return entropy.sum() / rollout.mask.sum().clamp(min=1)

    def _adapt(self, kl: Tensor, n: int) -> None:
        if self.kl_target is None:
            return
        ranks = self.trainer.world_size
        kl = float(self._over_ranks(kl)) / ranks
        coef = adapt_kl_coef(float(self.kl_coef), kl, target=self.kl_target, horizon=self.kl_horizon, n_steps=n * ranks)
        self.kl_coef.fill_(coef)

    def loss(self, part: Experience) -> tuple[Tensor, Tensor, Metrics]:
        mask, old = part["mask"], part["old"]
        hidden = self.model.features(part["input_ids"], part["segment_ids"])
        values = self.value_head(hidden).squeeze(-1).float()
        logprobs = token_logprobs(self.model, part, hidden=hidden)
        policy = policy_loss(logprobs, old, part["advantages"], mask, clip_range=self.clip_range)
        value = value_loss(values, part["values"], part["returns"], mask, clip_range=self.value_clip_range)
        metrics = policy_metrics(logprobs.detach(), old, part["advantages"], mask, clip_range=self.clip_range)
        metrics |= {"loss/policy": policy.detach(), "loss/value": value.detach()}
        return policy + self.value_coef * value, mask.sum(), metrics
