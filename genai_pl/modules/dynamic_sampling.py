"""Dynamic sampling: groups of a rollout that teach nothing are replaced by groups of other prompts (DAPO: Yu et al. 2025, 3.2).

A group whose completions all have the same score has advantages of 0. The functions here join rollouts and choose among
their groups; what teaches is known from the scores alone (`objectives.grpo.equal_groups`).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.modules.rollout import Rollout, ScoredRollout, select_rows
from genai_pl.objectives import IGNORED

FILLERS = {"labels": IGNORED}  # of padding; of the other tensors it is 0, or the pad token


def replace_groups(
    scored: ScoredRollout, equal: Tensor, more: ScoredRollout, more_equal: Tensor, *, pad: int
) -> tuple[ScoredRollout, Tensor]:
    """A rollout with its equal groups replaced by those of `more` that are not, as far as these go; and which are equal now.

    equal, more_equal: (groups,) True for a group whose completions all have the same score. pad: token that fills rows.
    Completions of a group are neighbours, and groups are as large in both.
    """
    places, found = equal.nonzero()[:, 0], (~more_equal).nonzero()[:, 0]
    n = min(len(places), len(found))
    groups = torch.arange(len(equal), device=equal.device)
    groups[places[:n]] = len(equal) + found[:n]
    joined = concatenate(scored, more, pad=pad)
    still_equal = torch.cat([equal, more_equal])[groups]
    return select_groups(joined, groups, n_groups=len(equal) + len(more_equal)), still_equal


def concatenate(first: ScoredRollout, second: ScoredRollout, *, pad: int) -> ScoredRollout:
    """The completions of two rollouts, one after the other, rows padded on the right to the longer ones."""
    a, b = first.rollout, second.rollout
    batch = {
        name: _join(values, b.batch[name], pad if name == "input_ids" else FILLERS.get(name, 0))
        for name, values in a.batch.items()
    }
    rollout = Rollout(
        batch,
        _join(a.token_positions, b.token_positions, 0),
        _join(a.mask, b.mask, False),
        [*a.completions, *b.completions],
        torch.cat([a.ended, b.ended]),
        None if a.turn_rewards is None else _join(a.turn_rewards, b.turn_rewards, 0.0),
        _join_metrics(a.metrics, b.metrics, a.ended, b.ended),
        None if a.step_ends is None else _join(a.step_ends, b.step_ends, False),
    )
    prompts, completions = [*first.prompts, *second.prompts], [*first.completions, *second.completions]
    return ScoredRollout(rollout, prompts, completions, torch.cat([first.scores, second.scores]))


def select_groups(scored: ScoredRollout, groups: Tensor, *, n_groups: int) -> ScoredRollout:
    """The part of a rollout of n_groups groups that belongs to some of them, in their order."""
    size, rollout = len(scored.scores) // n_groups, scored.rollout
    of_completions = {"positions": rollout.token_positions, "mask": rollout.mask, "ended": rollout.ended}
    of_completions |= {"scores": scored.scores}
    of_completions |= {} if rollout.turn_rewards is None else {"turn_rewards": rollout.turn_rewards}
    of_completions |= {} if rollout.step_ends is None else {"step_ends": rollout.step_ends}
    chosen = select_rows(of_completions, groups, n_groups)
    metrics = select_rows(rollout.metrics, groups, n_groups)
    batch = select_rows(rollout.batch, groups, n_groups)

    def pick(rows: Sequence) -> list:
        return [rows[group * size + i] for group in groups.tolist() for i in range(size)]

    completions, turn_rewards = pick(rollout.completions), chosen.get("turn_rewards")
    tensors = (chosen["positions"], chosen["mask"], completions, chosen["ended"], turn_rewards, metrics)
    selected = Rollout(batch, *tensors, chosen.get("step_ends"))
    return ScoredRollout(selected, pick(scored.prompts), pick(scored.completions), chosen["scores"])


def _join_metrics(first: Mapping[str, Tensor], second: Mapping[str, Tensor], *ended: Tensor) -> dict[str, Tensor]:
    """Numbers of episodes by name, nan for those of the rollout that has none of that name. ended: (N,) of each."""
    sides = [
        {name: of_side.get(name, torch.full(rows.shape, torch.nan, device=rows.device)) for name in {**first, **second}}
        for of_side, rows in zip((first, second), ended, strict=True)
    ]
    return {name: torch.cat([side[name] for side in sides]) for name in sides[0]}


def _join(first: Tensor, second: Tensor, filler: float) -> Tensor:
    """Two tensors along their first dimension, their second one filled on the right to the longer."""
    if first.dim() == 1:
        return torch.cat([first, second])
    width = max(first.shape[1], second.shape[1])
    return torch.cat([F.pad(x, (0, width - x.shape[1]), value=filler) for x in (first, second)])
