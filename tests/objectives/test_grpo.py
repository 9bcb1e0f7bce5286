"""Group-relative advantages and losses against loops over completions."""

import math
import warnings

import numpy as np
import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.objectives import completion_weights, group_advantages, grpo_loss, policy_loss, rloo_advantages

RNG = np.random.default_rng(3)
LENGTHS = [6, 1, 3, 0]
MASK = torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]
OLD = torch.from_numpy(RNG.normal(-2, 0.5, MASK.shape))
NEW = OLD + torch.from_numpy(RNG.normal(0, 0.4, MASK.shape))
REFERENCE = OLD + torch.from_numpy(RNG.normal(0, 0.4, MASK.shape))
ADVANTAGES = torch.from_numpy(RNG.normal(size=4))
OPTIONS = {"clip_range": 0.2, "clip_range_high": 0.28, "reference_logprobs": REFERENCE, "beta": 0.04}
NORMALIZATIONS = ("sequence", "token", "constant")


def token_losses(row: int) -> list[float]:
    losses = []
    for t in range(LENGTHS[row]):
        ratio, advantage = math.exp(NEW[row, t] - OLD[row, t]), ADVANTAGES[row].item()
        surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
        away = (REFERENCE[row, t] - NEW[row, t]).item()
        losses.append(-surrogate + 0.04 * (math.exp(away) - away - 1))
    return losses


def by_hand(normalization: str) -> float:
    rows = [token_losses(row) for row in range(4)]
    if normalization == "sequence":
        return sum(sum(row) / max(len(row), 1) for row in rows) / 4
    return sum(map(sum, rows)) / (sum(LENGTHS) if normalization == "token" else 4 * 8)


def loss(logprobs: torch.Tensor, normalization: str) -> torch.Tensor:
    weights, divisor = completion_weights(MASK, normalization=normalization, length=8)
    return grpo_loss(logprobs, OLD, ADVANTAGES, weights, **OPTIONS) / divisor


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_loss_is_the_surrogate_and_divergence_of_each_token_normalized(normalization: str) -> None:
    assert loss(NEW, normalization).item() == pytest.approx(by_hand(normalization))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_gradient_is_the_slope_along_any_direction(normalization: str) -> None:
    direction, leaf = torch.from_numpy(RNG.normal(size=NEW.shape)), NEW.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, normalization), leaf)
    slope = (loss(NEW + 1e-6 * direction, normalization) - loss(NEW - 1e-6 * direction, normalization)) / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("filler", [1e3, -1e3])
def test_padding_and_what_stands_in_it_change_nothing(normalization: str, filler: float) -> None:
    garbage = torch.where(MASK, NEW, filler).requires_grad_()
    found = loss(garbage, normalization)
    torch.testing.assert_close(found, loss(NEW, normalization))
    (gradient,) = torch.autograd.grad(found, garbage)
    assert torch.isfinite(gradient).all()
    assert not gradient[~MASK].any()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_batches_add_up_to_the_loss_of_all(normalization: str) -> None:
    total, divisor = 0, 0
    for part in (slice(0, 1), slice(1, 4)):
        weights, n = completion_weights(MASK[part], normalization=normalization, length=8)
        options = {**OPTIONS, "reference_logprobs": REFERENCE[part]}
        total, divisor = total + grpo_loss(NEW[part], OLD[part], ADVANTAGES[part], weights, **options), divisor + n
    torch.testing.assert_close(total / divisor, loss(NEW, normalization))


def test_without_a_reference_and_by_token_it_is_ppos_policy_loss() -> None:
    weights, _ = completion_weights(MASK, normalization="token")
    expected = policy_loss(NEW, OLD, ADVANTAGES[:, None].expand_as(NEW), MASK, clip_range=0.2)
    torch.testing.assert_close(grpo_loss(NEW, OLD, ADVANTAGES, weights, clip_range=0.2), expected)


def test_an_unknown_normalization_is_an_error_that_names_the_others() -> None:
    with pytest.raises(ConfigError, match="choose sequence, token or constant"):
        completion_weights(MASK, normalization="mean")
    with pytest.raises(ConfigError, match="with a length"):
        completion_weights(MASK, normalization="constant")


def test_advantages_are_rewards_standardized_within_their_group() -> None:
    rewards = RNG.normal(2, 5, 12)
    expected = [(r - g.mean()) / (g.std(ddof=1) + 1e-4) for g in rewards.reshape(3, 4) for r in g]
    assert group_advantages(torch.from_numpy(rewards), 4).tolist() == pytest.approx(expected)
    centered = [r - g.mean() for g in rewards.reshape(3, 4) for r in g]
    assert group_advantages(torch.from_numpy(rewards), 4, scale="none").tolist() == pytest.approx(centered)


def test_a_completion_is_no_baseline_of_its_own() -> None:
    rewards = RNG.normal(2, 5, (3, 4))
    expected = [g[i] - np.delete(g, i).mean() for g in rewards for i in range(4)]
    found = rloo_advantages(torch.from_numpy(rewards.flatten()), 4)
    assert found.tolist() == pytest.approx(expected)
    centered = group_advantages(torch.from_numpy(rewards.flatten()), 4, scale="none")
    torch.testing.assert_close(found, centered * 4 / 3)


@pytest.mark.parametrize("reward", [0.0, 0.1, -7.3, 1000.1])
def test_a_group_of_equal_rewards_teaches_nothing(reward: float) -> None:
    rewards = torch.full((6,), reward)
    assert not group_advantages(rewards, 3).any()
    assert not rloo_advantages(rewards, 3).any()


def test_a_group_of_one_and_an_unknown_scale_are_errors() -> None:
    for advantages in (group_advantages, rloo_advantages):
        with pytest.raises(ConfigError, match="at least 2 completions"):
            advantages(torch.zeros(3), 1)
    with pytest.raises(ConfigError, match="choose std, batch or none"):
        group_advantages(torch.zeros(4), 2, scale="all")


def test_completions_without_a_reward_are_in_no_mean_and_have_no_advantage_as_in_trl() -> None:
    nan = float("nan")
    rewards = torch.tensor([nan, 1.0, 4.0, 2.0, nan, nan, 3.0, nan, nan, nan, nan, nan])
    groups = rewards.view(-1, 4).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy of groups without a number
        means = np.nanmean(groups, 1, keepdims=True)
        stds = np.nanstd(groups, 1, ddof=1, keepdims=True)
        expected = np.nan_to_num((groups - means) / (np.nan_to_num(stds) + 1e-4))  # GRPOTrainer of TRL 1.16
    found = group_advantages(rewards, 4)
    torch.testing.assert_close(found, torch.from_numpy(expected).flatten().float())
    torch.testing.assert_close(rloo_advantages(rewards, 4), torch.tensor([0.0, -2.0, 2.5, -0.5] + [0.0] * 8))
