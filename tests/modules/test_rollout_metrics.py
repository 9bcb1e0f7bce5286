"""Metrics of rollouts: what no reward applies to has no score."""

from types import SimpleNamespace

import torch

from genai_pl.modules.policy_gradient import PolicyGradientModule


def test_a_rollout_without_any_reward_logs_no_score() -> None:
    def one(value: float, n: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(value), torch.tensor(n)

    means = {
        "objective/scores": one(0, 0),
        "objective/rlhf_reward": one(0, 0),
        "objective/kl": one(3, 2),
        "loss": one(0, 1),
    }
    rollout = SimpleNamespace(means=means, device="cpu", _over_ranks=lambda sums: sums)
    assert PolicyGradientModule.step_metrics(rollout) == {"objective/kl": 1.5, "train/loss": 0.0}
    rollout.means["objective/scores"] = one(4, 2)
    assert PolicyGradientModule.step_metrics(rollout)["objective/scores"] == 2
