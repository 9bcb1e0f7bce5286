"""How long a run and its warmup are where nobody says so, and what is said of it."""

import json
from pathlib import Path

import pytest

from genai_pl.training.length import (
    BEFORE,
    Length,
    choose_length,
    default_warmup,
    describe_length,
    read_stored_length,
    with_warmup,
)
from tests.conftest import TINY

LINE = "length      "
ROWS = [{"prompt": f"say {n}", "completion": f"I say {n}."} for n in range(30)]
GIVEN = {"max_steps": None, "max_epochs": None, "steps_per_pass": 12, "fine_tunes": False, "stored": None}


def length_of(out: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(LINE)).removeprefix(LINE)


def lines_of(path: str) -> list[dict[str, str]]:
    import csv

    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 500),
        ({"fine_tunes": True}, 3 * 12),  # num_train_epochs of transformers and TRL
        ({"fine_tunes": True, "steps_per_pass": None}, 500),
        ({"max_epochs": 2}, 2 * 12),
        ({"max_epochs": 2, "max_steps": 7}, 2 * 12),
        ({"max_steps": 7, "fine_tunes": True}, 7),
        ({"stored": {"steps": 40, "warmup_steps": 8}, "fine_tunes": True}, 40),
        ({"stored": BEFORE, "fine_tunes": True}, 500),  # of a run that was begun before lengths were kept
        ({"stored": {"steps": 40, "warmup_steps": 8}, "max_steps": 90}, 90),
    ],
)
def test_a_run_is_as_long_as_it_is_told_and_else_fits_its_data(changes: dict, steps: int) -> None:
    assert choose_length(**{**GIVEN, **changes}).steps == steps


@pytest.mark.parametrize(("steps", "warmup"), [(500, 100), (12, 2), (4, 0), (60, 12), (100_000, 100)])
def test_warmup_is_100_steps_and_at_most_a_fifth_of_the_run(steps: int, warmup: int) -> None:
    assert default_warmup(steps) == warmup


def test_a_checkpoint_that_does_not_say_its_length_was_begun_with_the_defaults_of_then() -> None:
    assert read_stored_length({}) == {"steps": 500, "warmup_steps": 100}
    assert read_stored_length({"length": {"steps": 36, "warmup_steps": 7}}) == {"steps": 36, "warmup_steps": 7}
    assert read_stored_length({"length": ["no", "numbers"]}) == BEFORE


def test_a_warmup_that_swallows_the_run_is_said() -> None:
    assert "all of it, the learning rate never reaches its peak" in describe_length(Length(12, 100), 100)
    assert describe_length(Length(12, 100), 0).endswith("0.12 passes over the data, no warmup")


def test_only_a_schedule_that_warms_up_is_given_a_warmup() -> None:
    from functools import partial

    def flat(step: int, *, total_steps: int) -> float:
        return 1.0

    assert with_warmup(flat, 10, None) is flat
    typed = partial(flat, warmup_steps=3)
    assert with_warmup(typed, 10, None) is typed


def test_a_run_of_12_steps_reaches_its_rate_and_a_checkpoint_keeps_what_it_began_with(command, tmp_path: Path) -> None:
    arguments = ("train", *TINY, "trainer.max_steps=12", "optimizer.lr=1e-3", "scheduler=constant", "hydra.run.dir=run")
    result = command(*arguments)
    assert "warmup 2 steps (17%)" in length_of(result.out)
    rates = [float(row["train/lr"]) for row in lines_of("run/metrics.csv") if row["train/lr"]]
    assert rates == pytest.approx([0.0, 5e-4, *[1e-3] * 10])
    longer = command("train", "resume=run", "trainer.max_steps=40")  # whose own warmup would be 8 steps
    assert longer.status == 0, longer.err
    assert "warmup 2 steps (5%)" in length_of(longer.out)
    rates = [float(row["train/lr"]) for row in lines_of("run/metrics.csv") if row["train/lr"]]
    assert rates[12:] == pytest.approx([1e-3] * 28)


def test_a_trained_model_makes_three_passes_over_examples_and_a_new_one_500_steps(command, tmp_path: Path) -> None:
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tiny = [option for option in TINY if not option.startswith("trainer.max_steps")]
    assert command("train", *TINY, "trainer.max_steps=1", "output_dir=base").status == 0
    data = ("objective=sft", "data.path=chat.jsonl", "data.packing=false", "data.batch_size=5")
    result = command("train", *tiny, *data, "init_from=base", "output_dir=tuned")
    assert result.status == 0, result.err
    # 27 of 30 rows in batches of 5, the last of which is not full and left out: 5 steps a pass
    assert length_of(result.out).startswith("15 steps = 3 passes over the data (the default")
    assert json.loads(Path("tuned/results.json").read_text())["step"] == 15
    plan = command("train", *tiny, *data, "init_from=base", "dry_run=true")
    assert "3 passes over the data" in length_of(plan.out)
    new = command("train", *tiny, *data, "dry_run=true")
    assert "500 steps = " in new.out


def test_passes_of_a_policy_are_passes_over_its_prompts(command, tmp_path: Path) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n}"}) + "\n" for n in range(20)))
    Path("judge.py").write_text("def zero(prompts, completions, **columns):\n    return [0.0 for _ in completions]\n")
    options = ("objective=ppo", "objective.reward=judge.py:zero", "objective.max_new_tokens=2", "data.batch_size=6")
    lengths = ("trainer.max_steps=null", "trainer.max_epochs=1", "objective.minibatch_size=3", "objective.epochs=2")
    result = command("train", *TINY, *options, *lengths, "data.path=prompts.jsonl")
    assert result.status == 0, result.err
    # 18 of 20 prompts are 3 rollouts, each good for 2 passes of 2 minibatches
    assert length_of(result.out).startswith("12 steps = 1 pass over the data")


@pytest.mark.parametrize(
    "mistake", ["trainer.max_epochs=0", "trainer.max_epochs=half", "trainer.max_steps=1.5", "scheduler.warmup_steps=-1"]
)
def test_a_length_that_is_none_is_one_line(mistake: str, command) -> None:
    result = command("train", *TINY, mistake)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith(f"error: {mistake.partition('=')[0]}")
