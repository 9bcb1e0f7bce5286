"""Metrics of rollouts: what no reward applies to has no score."""

from types import SimpleNamespace

import torch

from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.modules.rollout_module import RolloutModule


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


def test_a_validation_leaves_out_what_no_completion_has_and_counts_the_others_by_their_own_number() -> None:
    class Module(RolloutModule):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        step = None

    sums = {"kl": 6.0, "scores": 0.0, "scores/scored": 0.0, "turns": 3.0, "turns/scored": 2.0, "scores/a": 1.0}
    sums = {name: torch.tensor(value) for name, value in {**sums, "scores/a/scored": 4.0}.items()}
    found = Module().summarize(sums, torch.tensor(8.0))
    assert {name: float(value) for name, value in found.items()} == {"kl": 0.75, "turns": 1.5, "scores/a": 0.25}
