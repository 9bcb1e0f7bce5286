"""A curriculum draws prompts by p (1 - p) of their measured pass rates, and a resumed run draws the same."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from genai_pl.modules.curriculum import Curriculum
from tests.conftest import TINY
from tests.training.test_alignment import table

REWARD = """
import pathlib

def hard(prompts, completions, **columns):
    with open("asked.txt", "a") as file:
        file.write("".join(f"{prompt}\\n" for prompt in prompts))
    numbers = [int(prompt.split()[0]) for prompt in prompts]
    return [float(n % 4 == 0 and len(text) % 2 == 0) for n, text in zip(numbers, completions)]
"""
RUN = (
    *("train", "objective=grpo", *TINY, "model.n_head=4", "optimizer=adamw", "scheduler.warmup_steps=2"),
    *("trainer.limit_val_batches=0", "objective.max_new_tokens=6", "objective.group_size=4", "data.batch_size=4"),
    *("objective.reward=rewards:hard", "data.path=prompts.jsonl", "objective.curriculum=0.5", "trainer.max_steps=8"),
)

RESUME = ("resume=whole/checkpoints/step=000004.ckpt", "hydra.run.dir=whole", "objective.reward=rewards:hard")


def counted(n_rows: int, *, share: float = 0.5) -> Curriculum:
    """A curriculum of prompts 0, 1, 2, ... with pass rates 0, 1/2, 1, 0, 1/2, 1, ... of 8 completions each."""
    curriculum = Curriculum(n_rows, share=share, pass_score=0.5)
    scores = torch.tensor([[0.0] * 8, [0.0, 1.0] * 4, [1.0] * 8]).repeat(-(-n_rows // 3), 1)[:n_rows]
    curriculum.record(range(n_rows), scores.flatten())
    curriculum.advance(lambda x: x, torch.device("cpu"))
    return curriculum


def test_prompts_are_drawn_in_proportion_to_the_variance_of_their_reward() -> None:
    curriculum, generator = counted(300), torch.Generator().manual_seed(0)
    np.testing.assert_allclose(
        curriculum.weights()[:3], [9 / 100, 1 / 4, 9 / 100]
    )  # (0+1)/(8+2), (4+1)/(8+2), (8+1)/(8+2)
    counts = Counter(int(row) % 3 for _ in range(60) for row in curriculum.order(generator)[:20])
    shares = np.array([counts[i] / 1200 for i in range(3)])
    expected = np.array([0.09, 0.25, 0.09]) / 0.43
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / 1200)


def test_a_share_is_drawn_and_no_prompt_comes_twice() -> None:
    curriculum, rows = counted(50), torch.tensor([3, 7, -1, 20, 41, 8, 9, 30, 2])  # -1: a rank with a prompt less
    drawn = curriculum.draw(rows, torch.Generator().manual_seed(1))
    assert drawn[2] == -1
    assert len({*drawn.tolist()}) == len(rows)
    assert int((drawn != rows).sum()) <= 4
    assert (drawn == curriculum.draw(rows, torch.Generator().manual_seed(1))).all()
    # a set of prompts that is as small as a rollout
    small = counted(4, share=1.0)
    assert sorted(small.draw(torch.arange(4), torch.Generator().manual_seed(2)).tolist()) == [0, 1, 2, 3]


def test_earlier_tries_weigh_less_and_ranks_are_summed() -> None:
    curriculum = counted(3)
    curriculum.record([1], torch.tensor([1.0, 1.0, torch.nan, 0.2]))
    assert curriculum.advance(lambda x: 2 * x, torch.device("cpu")) == (2.0, 3.0)
    assert curriculum.tries.tolist() == [8, 4 + 6, 8]
    assert curriculum.passes.tolist() == [0, 2 + 4, 8]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i} is "}) + "\n" for i in range(40)))
    (tmp_path / "rewards.py").write_text(REWARD)
    return tmp_path


@pytest.mark.parametrize("more", [(), pytest.param(("objective.dynamic_sampling=2",), marks=pytest.mark.slow)])
def test_a_run_asks_again_what_it_can_learn_and_resumes_exactly(more: tuple, place: Path, command) -> None:
    result = command(*RUN, *more, "callbacks.checkpoint.every_n_steps=4", "hydra.run.dir=whole")
    assert result.status == 0, result.err
    rows, asked = table(place / "whole"), (place / "asked.txt").read_text().splitlines()
    assert float(rows[-1]["objective/measured_prompts"]) > float(rows[0]["objective/measured_prompts"])
    scores = [float(row["objective/scores"]) for row in rows]
    if not more:
        assert [float(row["objective/pass_rate"]) for row in rows] == scores  # rewards are 0 or 1
    (place / "asked.txt").unlink()
    assert command("train", *RESUME).status == 0
    assert (place / "asked.txt").read_text().splitlines() == asked[-len(asked) // 2 :] or more
    assert [row["train/loss"] for row in table(place / "whole")] == [row["train/loss"] for row in rows]


def test_a_mistake_is_one_line(place: Path, command) -> None:
    for options, message in (
        (("objective.curriculum=2",), "objective.curriculum must be from 0 to 1, the share that is drawn, not 2"),
        (("data.streaming=true",), "data.streaming"),
    ):
        result = command(*RUN, *options)
        assert result.status in (1, 2)
        assert message in result.err
        assert result.err.count("\n") == 1
