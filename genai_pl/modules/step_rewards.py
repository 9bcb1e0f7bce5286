"""Step rewards: what a process reward model gives the steps of completions, at the tokens that end them."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DENSE = "dense"
AGGREGATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "last": lambda rewards: rewards[-1],
    "mean": lambda rewards: sum(rewards) / len(rewards),
    "product": math.prod,
}


class StepRewards(NamedTuple):
    """The rewards of the steps of one completion, and the characters of its text at which these end."""

    ends: list[int]
    rewards: list[float]

    def weighted(self, weight: float) -> "StepRewards":
        """The same steps with `weight` times their rewards."""
        return StepRewards(self.ends, [weight * reward for reward in self.rewards])


class StepScores(NamedTuple):
    """Rewards of completions of which some were given for steps.

    scores: all rewards of each completion. steps: those of its steps, which are part of them.
    """

    scores: list[float]
    steps: list[list[StepRewards]]


def place_steps(tokens: Sequence[int], ends: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The token, counted from 0, with which each step of a completion ends; the last one ends with the last token.

    ends: characters of the decoded text. A token that holds the end of a step and the beginning of the next ends the first.

    >>> place_steps([1, 2, 3, 4], [2, 3], lambda ids: "".join({1: "a", 2: "bc", 3: "d", 4: ""}[id] for id in ids))
    [1, 3]
    """
    lengths = range(1, len(tokens) + 1)
    found = [bisect_left(lengths, end, key=lambda n: len(decode(tokens[:n]))) for end in ends[:-1]]
    return [*found, len(tokens) - 1]


def step_tensors(
    completions: Sequence[Sequence[int]],
    steps: Sequence[Sequence[StepRewards]],
    decode: Callable[[Sequence[int]], str],
    length: int,
) -> tuple[Tensor, Tensor]:
    """Rewards (N, L) at the last tokens of steps, 0 elsewhere, and where steps end (N, L).

    completions: N rows of tokens. steps: of each completion, by every reward that gives some. length: L.
    """
    rewards = torch.zeros(len(completions), length)
    ends = torch.zeros(len(completions), length, dtype=torch.bool)
    for i, (tokens, given) in enumerate(zip(completions, steps, strict=True)):
        for one in given:
            for place, reward in zip(place_steps(tokens, one.ends, decode), one.rewards, strict=True):
                rewards[i, place] += reward
                ends[i, place] = True
    return rewards, ends
