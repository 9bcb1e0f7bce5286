"""Proximal policy optimization with a value head, for language models.

The reward of a token is a penalty for its distance to the reference; the last token of a completion also gets the
score. A value head predicts the return of each state, from the policy's own hidden states or those of a separate
critic, and generalized advantage estimation turns rewards and values into advantages. The functions are in
`objectives/ppo.py`, with equation numbers.
"""

import torch
from torch import Tensor, nn

from genai_pl.config.enums import Head
from genai_pl.errors import ConfigError
from genai_pl.models import Decoder
from genai_pl.modules.base import Batch, Metrics
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.modules.preference import token_logprobs
from genai_pl.modules.rollout import Experience, Rollout, gather_tokens
from genai_pl.modules.rollout_module import Means
from genai_pl.objectives.grpo import clipped_tokens
from genai_pl.objectives.ppo import (
    adapt_kl_coef,
    gae,
    kl_estimate,
    kl_rewards,
    moment_sums,
    policy_loss,
    policy_metrics,
    value_loss,
    whiten,
)


class PPOModule(PolicyGradientModule):
    """Clipped policy and value losses (Schulman et al. 2017) on KL-penalized rewards (Ziegler et al. 2019).

    kl_coef: coefficient of the KL penalty in the rewards; with kl_target it is adapted over kl_horizon completions
    kl_estimator: k1, k2 or k3, the estimate of the KL of a token from two log-probabilities
    gamma, gae_lambda: discount and decay of generalized advantage estimation, per token
    clip_range, value_clip_range: of the ratio of policies, and of the change of values
    value_coef, entropy_coef: weights of the value loss and of an entropy bonus
    critic: name of a decoder or reward model that predicts values; None: a head on the policy

    `kl_coef` is a buffer: a resumed run goes on with the adapted coefficient.
    """

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
        entropy_coef: float,
        critic: str | None,
        **options: object,
    ) -> None:
        super().__init__(*args, group_size=1, **options)
        self.register_buffer("kl_coef", torch.tensor(kl_coef))
        self.kl_target, self.kl_horizon, self.kl_estimator = kl_target, kl_horizon, kl_estimator
        self.gamma, self.gae_lambda = gamma, gae_lambda
        self.clip_range, self.value_clip_range, self.value_coef = clip_range, value_clip_range, value_coef
        self.entropy_coef = entropy_coef
        self.critic_name, self.critic = critic, None
        self._make_head(self.model.config.n_embd)

    def models(self) -> list[nn.Module]:
        return [*super().models(), *([] if self.critic is None else [self.critic])]

    def named_parameters_for_optimizer(self):
        """The policy's parameters, the value head's, and the critic's."""
        yield from super().named_parameters_for_optimizer()
        yield from self.value_head.named_parameters(prefix="value_head")
        if self.critic is not None:
            yield from self.critic.named_parameters(prefix="critic")

    def use_critic(self, critic: nn.Module) -> None:
        """Predict values by a separate model, which is trained with the policy, instead of from the policy's features.

        ConfigError unless it is a decoder with the policy's vocabulary. Of a reward model, the score head initializes
        the value head.
        """
        if not isinstance(critic, Decoder) or critic.config.vocab_size != self.model.config.vocab_size:
            raise ConfigError(
                f"objective.critic={self.critic_name}: not a decoder of ours with the policy's vocabulary"
            )
        self._make_head(critic.config.n_embd)
        if critic.score is not None:  # a reward model: values begin as its scores
            self.value_head.weight.data.copy_(critic.score.weight)
            critic.score = None
        critic.set_head(Head.none)
        self.critic = critic.train(self.training)

    def _make_head(self, width: int) -> None:
        """A value head from hidden states of the given width, zero at first: advantages then are rewards."""
        self.value_head = nn.Linear(width, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def _values(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Predicted returns of the states of rows, (R, T), float32; hidden (R, T, C) are the policy's features."""
        if self.critic is not None:
            hidden = self.critic.features(batch["input_ids"], batch["segment_ids"])
        return self.value_head(hidden).squeeze(-1).float()

    def extra_outputs(self, minibatch: Experience, hidden: Tensor) -> Experience:
        return {"values": self._values(minibatch, hidden)}

    def make_experience(self, rollout: Rollout, scores: Tensor) -> tuple[Experience, Means]:
        """Whitened advantages and returns (N, L) from scores, KL penalties and values.

        ConfigError where a completion has no score: its advantage would be one of a reward that nobody gave.
        """
        if scores.isnan().any():
            raise ConfigError(
                "objective.reward: no reward applies to some completions (all gave None); PPO needs one for each"
            )
        # old log-probabilities, values, and the KL of each token
        mask, outputs = rollout.mask, self.rollout_logprobs(rollout)
        old_logprobs, values = outputs["old_logprobs"], torch.where(mask, outputs["values"], 0)
        kl = torch.where(mask, kl_estimate(old_logprobs, outputs["reference_logprobs"], self.kl_estimator), 0)
        # advantages; whitening over all ranks, as the loss is a mean over all of them
        given = {"kl_coef": float(self.kl_coef), "turn_rewards": rollout.turn_rewards}
        rewards = kl_rewards(scores, kl, mask, **given)
        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, gae_lambda=self.gae_lambda)
        advantages = whiten(advantages, mask, sums=self._over_ranks(moment_sums(advantages, mask)))
        # metrics, with the coefficient that these rewards were made with; then adapt it
        kl = kl.sum(1)
        means = self.describe(rollout, scores, kl, outputs["entropy"])
        means |= {"objective/rlhf_reward": (rewards.sum(), len(scores)), "objective/kl_coef": (self.kl_coef.clone(), 1)}
        self._adapt_kl_coef(kl.mean(), len(scores))
        experience = {
            "old_logprobs": old_logprobs,
            "values": values,
            "advantages": advantages,
            "returns": returns,
            "token_positions": rollout.token_positions,
            "mask": mask,
            "kl": kl,
        }
        return {**rollout.batch, **experience}, means

    def _adapt_kl_coef(self, kl: Tensor, n: int) -> None:
        """Move the KL coefficient towards kl_target, by the KL of n completions on each rank."""
        if self.kl_target is None:
            return
        ranks = self.trainer.world_size
        kl = float(self._over_ranks(kl)) / ranks
        coef = adapt_kl_coef(float(self.kl_coef), kl, target=self.kl_target, horizon=self.kl_horizon, n_steps=n * ranks)
        self.kl_coef.fill_(coef)

    def loss_normalizer(self, minibatch: Experience) -> Tensor:
        return minibatch["mask"].sum()

    def loss(self, minibatch: Experience) -> tuple[Tensor, Metrics]:
        """Policy loss plus weighted value loss of some rows, minus the entropy bonus, as sums over tokens."""
        # one forward pass serves log-probabilities, values and entropy
        mask, old_logprobs, hidden = minibatch["mask"], minibatch["old_logprobs"], self.features(minibatch)
        values = gather_tokens(self._values(minibatch, hidden), minibatch["token_positions"])
        logprobs = gather_tokens(token_logprobs(self.model, minibatch, hidden=hidden), minibatch["token_positions"])
        policy = policy_loss(logprobs, old_logprobs, minibatch["advantages"], mask, clip_range=self.clip_range)
        value = value_loss(values, minibatch["values"], minibatch["returns"], mask, clip_range=self.value_clip_range)
        metrics = policy_metrics(logprobs.detach(), old_logprobs, mask)
        arguments = (logprobs.detach(), old_logprobs, minibatch["advantages"], mask)
        metrics["policy/clipfrac"] = clipped_tokens("grpo", *arguments, clip_range=self.clip_range)
        metrics |= {"loss/policy": policy.detach(), "loss/value": value.detach()}
        loss = policy + self.value_coef * value
        if self.entropy_coef:
            loss = loss - self.entropy_coef * self.entropy(hidden, minibatch["labels"]).sum()
        return loss, metrics
