"""Rewards of steps: tokens that end steps, advantages by NumPy, and returns of PPO with a reward for each step."""

import numpy as np
import pytest
import torch

from genai_pl.modules.step_rewards import StepRewards, place_steps, step_tensors
from genai_pl.objectives.grpo import process_advantages
from genai_pl.objectives.ppo import gae, kl_rewards


def decode(ids: list[int]) -> str:
    return "".join({1: "a", 2: "b|", 3: "c", 4: "d|e", 5: ""}[n] for n in ids)


def test_steps_end_at_tokens() -> None:
    tokens = [1, 2, 3, 4, 1, 5]  # a b| c d|e a, and an end token
    assert place_steps(tokens, [3, 6, 8], decode) == [1, 3, 5]
    steps = [[StepRewards([3, 6, 8], [0.5, 0.25, 1.0]), StepRewards([8], [2.0])]]
    rewards, ends = step_tensors([tokens], steps, decode, 7)
    assert rewards.tolist() == [[0, 0.5, 0, 0.25, 0, 3, 0]]
    assert ends.nonzero()[:, 1].tolist() == [1, 3, 5]


@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_are_sums_of_later_normalized_rewards(scale: str) -> None:
    generator = np.random.default_rng(0)
    rewards, ends = generator.random((6, 8)), generator.random((6, 8)) < 0.4
    ends[:, 0] = True
    ours = process_advantages(torch.tensor(rewards * ends), torch.tensor(ends), 3, scale=scale)
    for group in (slice(0, 3), slice(3, 6)):  # Shao et al. 2024, 4.1.3, token by token
        all_rewards = rewards[group][ends[group]]
        deviation = all_rewards.std(ddof=1) + 1e-4 if scale == "std" else 1
        for i in range(group.start, group.stop):
            for t in range(8):
                later = [(rewards[i, u] - all_rewards.mean()) / deviation for u in range(t, 8) if ends[i, u]]
                assert ours[i, t].item() == pytest.approx(sum(later), abs=1e-10)


def test_equal_steps_have_no_advantage() -> None:
    ends = torch.tensor([[True, False, True], [False, True, False]])
    assert process_advantages(0.7 * ends, ends, 2).abs().max() == 0


def test_returns_of_dense_rewards_are_sums_of_later_ones() -> None:
    mask = torch.tensor([[True] * 4 + [False]])
    steps = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.0]])
    scores = steps.sum(1) - 0.1  # a penalty beside the steps, which falls on the last token
    rewards = kl_rewards(scores, torch.zeros(1, 5), mask, kl_coef=0.0, turn_rewards=steps)
    _, returns = gae(rewards, torch.zeros(1, 5), mask, gamma=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(returns[0], [0.65, 0.65, 0.15, 0.15, 0], atol=1e-6)
