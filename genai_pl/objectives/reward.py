"""Reward model losses: scores whose differences explain which completion people preferred."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_reward_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """-sum log sigmoid(chosen - rejected - margin) over rewards (B,) (Bradley-Terry; margin: Touvron et al. 2023, eq. 2).

    centering adds centering (chosen + rejected)^2, which fixes the constant that differences leave open (Eisenstein et
    al. 2023, eq. 2).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    pairs = torch.stack([chosen, rejected], dim=-1)
    return centering * centering_penalty(pairs) - F.logsigmoid(difference).sum()


def centering_penalty(rewards: Tensor) -> Tensor:
    """The square of twice the mean reward of each row (B, k), summed: for pairs (chosen + rejected)^2."""
    return (2 * rewards.mean(-1)).square().sum()


def ranking_loss(rewards: Tensor) -> Tensor:
    """The mean of -log sigmoid(better - worse) over all pairs of each row, summed over rows (Ouyang et al. 2022, eq. 1).

    rewards are (B, k), the best first. Pairs of one prompt belong in one batch: apart they overfit.
    """
    better, worse = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1, device=rewards.device)
    return -F.logsigmoid(rewards[:, better] - rewards[:, worse]).mean(1).sum()


def plackett_luce_loss(rewards: Tensor) -> Tensor:
    """-sum log P(ranking) where each place goes to one of those left, by softmax (Plackett 1975; Luce 1959).

    rewards are (B, k), the best first.
    """
    left = rewards.flip(-1).logcumsumexp(-1).flip(-1)  # (B, k): log-sum-exp of a place and all after it
    return (left - rewards).sum()


@torch.no_grad()
def reward_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How many chosen completions have the higher reward; a tie is none."""
    return (chosen > rejected).sum()


@torch.no_grad()
def ranking_accuracy(rewards: Tensor) -> Tensor:
    """The share of pairs in the right order of each row (B, k), the best first, summed over rows; a tie is none.

    >>> round(ranking_accuracy(torch.tensor([[3.0, 1.0, 2.0]])).item(), 3)
    0.667
    """
    better, worse = torch.triu_indices(rewards.shape[1], rewards.shape[1], 1, device=rewards.device)
    return (rewards[:, better] > rewards[:, worse]).float().mean(1).sum()
