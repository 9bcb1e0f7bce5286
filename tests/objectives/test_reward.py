"""Losses of reward models against their formulas, and against what they say of probabilities."""

import itertools
import math

import numpy as np
import pytest
import torch

from genai_pl.objectives import (
    centering_penalty,
    pairwise_reward_loss,
    plackett_luce_loss,
    ranking_accuracy,
    ranking_loss,
    reward_accuracy,
)

RNG = np.random.default_rng(1)
CHOSEN, REJECTED, MARGIN = RNG.normal(size=(3, 8))
RANKED = RNG.normal(size=(5, 4))


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_the_pairwise_loss_is_bradley_terry_with_a_margin_and_centering() -> None:
    c, r, m = (torch.from_numpy(a) for a in (CHOSEN, REJECTED, MARGIN))
    plain = -sum(log_sigmoid(a - b) for a, b in zip(CHOSEN, REJECTED, strict=True))
    assert pairwise_reward_loss(c, r).item() == pytest.approx(plain)
    expected = 0.0
    for a, b, margin in zip(CHOSEN, REJECTED, MARGIN, strict=True):
        expected += -log_sigmoid(a - b - margin) + 0.01 * (a + b) ** 2
    assert pairwise_reward_loss(c, r, margin=m, centering=0.01).item() == pytest.approx(expected)


def test_only_centering_sees_a_constant_added_to_all_rewards() -> None:
    c, r = torch.from_numpy(CHOSEN), torch.from_numpy(REJECTED)
    torch.testing.assert_close(pairwise_reward_loss(c + 5, r + 5), pairwise_reward_loss(c, r))
    assert pairwise_reward_loss(c + 5, r + 5, centering=0.1) > pairwise_reward_loss(c, r, centering=0.1) + 1


def test_the_ranking_loss_is_the_mean_over_all_pairs_of_each_prompt() -> None:
    expected = 0.0
    for rewards in RANKED:
        pairs = list(itertools.combinations(rewards, 2))
        expected -= sum(log_sigmoid(better - worse) for better, worse in pairs) / len(pairs)
    assert ranking_loss(torch.from_numpy(RANKED)).item() == pytest.approx(expected)


def test_plackett_luce_is_the_probability_of_drawing_the_ranking_place_by_place() -> None:
    expected = 0.0
    for rewards in RANKED:
        for place in range(len(rewards)):
            expected -= math.log(math.exp(rewards[place]) / sum(math.exp(r) for r in rewards[place:]))
    assert plackett_luce_loss(torch.from_numpy(RANKED)).item() == pytest.approx(expected)


def test_plackett_luce_probabilities_of_all_rankings_add_up_to_one() -> None:
    rewards = torch.from_numpy(RANKED[0])
    total = sum((-plackett_luce_loss(rewards[list(order)][None])).exp() for order in itertools.permutations(range(4)))
    assert total.item() == pytest.approx(1)


@pytest.mark.parametrize("loss", [ranking_loss, plackett_luce_loss])
def test_a_ranking_of_two_is_a_pair(loss) -> None:
    c, r = torch.from_numpy(CHOSEN), torch.from_numpy(REJECTED)
    torch.testing.assert_close(loss(torch.stack([c, r], 1)), pairwise_reward_loss(c, r))


def test_gradients_are_those_of_finite_differences() -> None:
    c, r = torch.from_numpy(CHOSEN).requires_grad_(), torch.from_numpy(REJECTED).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: pairwise_reward_loss(a, b, centering=0.1), (c, r))
    ranked = torch.from_numpy(RANKED).requires_grad_()
    assert torch.autograd.gradcheck(ranking_loss, (ranked,))
    assert torch.autograd.gradcheck(plackett_luce_loss, (ranked,))


def test_rewards_far_apart_do_not_overflow() -> None:
    rewards = torch.tensor([[-500.0, 500.0, 0.0]], requires_grad=True)
    for loss in (ranking_loss, plackett_luce_loss):
        value = loss(rewards)
        assert torch.isfinite(value)
        assert torch.isfinite(torch.autograd.grad(value, rewards)[0]).all()


def test_accuracy_counts_pairs_and_no_ties() -> None:
    assert reward_accuracy(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])) == 1


def test_the_accuracy_of_a_ranking_is_the_share_of_its_pairs_in_order() -> None:
    rewards = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 2.0], [2.0, 3.0, 1.0]])
    assert ranking_accuracy(rewards).item() == pytest.approx(1 + 0 + 2 / 3)


def test_centering_of_a_ranking_is_that_of_its_mean_and_of_pairs_the_published_one() -> None:
    assert centering_penalty(torch.tensor([[1.0, 2.0], [-1.0, 1.0]])).item() == pytest.approx((1 + 2) ** 2)
    assert centering_penalty(torch.tensor([[3.0, 0.0, 3.0]])).item() == pytest.approx(16.0)
