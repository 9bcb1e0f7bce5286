"""Groups that teach nothing give way to others of a further rollout, token by token, in both layouts of rows."""

import numpy as np
import pytest
import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.modules.dynamic_sampling import replace_groups
from genai_pl.modules.rollout import ScoredRollout, generate_rollout
from genai_pl.objectives.grpo import equal_groups
from tests.models.test_packed_linear import build

PROMPTS = [np.arange(n) + 3 for n in (4, 9, 2, 6, 5)]
SAMPLING = GenerationConfig(max_new_tokens=6, temperature=1.0)
SCORES = [[0, 1], [1, 1], [2, 2], [0, 3], [5, 5]]


def scored(first: int, last: int, *, share: bool) -> ScoredRollout:
    """Two completions of each of some prompts, with the scores that stand above."""
    options = {"generator": torch.Generator().manual_seed(first), "ends": [59], "pad": 0}
    rollout = generate_rollout(build("gpt2"), PROMPTS[first:last], SAMPLING, copies=2, share_prompts=share, **options)
    texts = [f"{prompt} {copy}" for prompt in range(first, last) for copy in range(2)]
    scores = torch.tensor(SCORES[first:last], dtype=torch.float32).flatten()
    return ScoredRollout(rollout, texts, [f"{text} answer" for text in texts], scores)


def tokens(scored: ScoredRollout, n: int) -> tuple[list[int], list[int]]:
    """The n-th completion as its labels in the rows have it, and as the rollout lists it."""
    rollout, per_row = scored.rollout, len(scored.scores) // len(scored.rollout.batch["labels"])
    row = rollout.batch["labels"][n // per_row]
    return row[rollout.token_positions[n][rollout.mask[n]]].tolist(), list(rollout.completions[n])


@pytest.mark.parametrize("share", [False, True])
def test_equal_groups_give_way_in_place_to_those_that_teach(share: bool) -> None:
    first, more = scored(0, 3, share=share), scored(3, 5, share=share)
    joined, equal = replace_groups(first, equal_groups(first.scores, 2), more, equal_groups(more.scores, 2), pad=0)
    assert joined.prompts == ["0 0", "0 1", "3 0", "3 1", "2 0", "2 1"]  # one of two found a successor
    assert joined.scores.tolist() == [0, 1, 0, 3, 2, 2]
    assert equal.tolist() == [False, False, True]
    sources = [(first, 0), (first, 1), (more, 0), (more, 1), (first, 4), (first, 5)]
    for n, (source, i) in enumerate(sources):
        in_rows, listed = tokens(joined, n)
        assert in_rows == listed == tokens(source, i)[1]
        assert joined.rollout.ended[n] == source.rollout.ended[i]
    # the prompt stands before its completions, and padding belongs to no segment
    batch, row = joined.rollout.batch, 1 if share else 2
    assert batch["input_ids"][row, :6].tolist() == PROMPTS[3].tolist()
    assert not batch["input_ids"][batch["segment_ids"] == 0].any()
    assert (batch["labels"][batch["segment_ids"] == 0] == -100).all()


def test_numbers_of_episodes_go_with_their_completions() -> None:
    first, more = scored(0, 3, share=False), scored(3, 5, share=False)

    def episodes(of: ScoredRollout, start: int, *names: str) -> ScoredRollout:
        rewards = of.rollout.mask * (torch.arange(len(of.scores)) + start)[:, None].float()
        metrics = {name: torch.arange(len(of.scores)).float() + start for name in names}
        return of._replace(rollout=of.rollout._replace(turn_rewards=rewards, metrics=metrics))

    sides = episodes(first, 0, "turns"), episodes(more, 10, "turns", "won")
    equal = [equal_groups(side.scores, 2) for side in sides]
    joined, _ = replace_groups(sides[0], equal[0], sides[1], equal[1], pad=0)
    numbers = [0.0, 1.0, 10.0, 11.0, 4.0, 5.0]
    assert joined.rollout.metrics["turns"].tolist() == numbers
    assert joined.rollout.metrics["won"].isnan().tolist() == [True, True, False, False, True, True]
    rewards = joined.rollout.turn_rewards
    assert torch.equal(rewards, joined.rollout.mask * torch.tensor(numbers)[:, None])
