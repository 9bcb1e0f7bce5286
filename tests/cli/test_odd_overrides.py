"""Whatever is typed for an option, a command does its work or says in one line what is wrong with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import odd_overrides
from tests.cli.odd_overrides import ROOT, Case, Outcome, draw

KNOWN = {  # base, and what is typed: what the line begins with
    "callbacks.samples=null": "callbacks.samples=null: has fields of its own to be set: every_n_steps, ",
    "callbacks.samples.every_n_steps=0": "callbacks.samples.every_n_steps=0: expected a whole number of at least 1",
    "callbacks.checkpoint.every_n_steps=0": "callbacks.checkpoint.every_n_steps=0: expected",
    "callbacks.checkpoint.keep=null": "callbacks.checkpoint.keep=null: expected a whole number of at least 1",
    "data.batch_size=0": "data.batch_size=0: expected a whole number of at least 1",
    "data.val_batch_size=0": "data.val_batch_size=0: expected",
    "data.workers=999999": "data.workers=999999: expected a whole number of at least 0 and at most 1,024",
    "trainer.val_check_interval=0": "trainer.val_check_interval=0: expected a whole number of at least 1; trainer.limit_val",
    "trainer.val_check_interval=null": "trainer.val_check_interval=null: expected",
    "trainer.log_every_n_steps=0": "trainer.log_every_n_steps=0: expected",
    "trainer.num_nodes=0": "trainer.num_nodes=0: expected",
    "trainer.recompute_every=[1,2]": "trainer.recompute_every=[1, 2]: expected",
    "precision.matmul=3": "precision.matmul=3: expected one of auto, highest, high, medium",
    "optimizer.lr=nan": "optimizer.lr",
    "objective.z_loss=null": "objective.z_loss=null: expected a number",
    "data=null": "data=null: no such option; data is one of chat, labelled, pairs",
    "strategy=3": "strategy=3: no such option; strategy is one of auto, ddp",
    "plan=[null]": "plan=[null]: no such option; plan is one of a100",
    "objective=contrastive model=t5_nano data.path=pairs.jsonl": "objective=contrastive needs a model of shape",
    "objective=permutation model=bert_nano": "objective=permutation needs model.position=xl",
    "peft=lora peft.modules_to_save=3": "peft.modules_to_save=3: expected a list",
    "peft=lora peft.rank=null": "peft.rank=null: expected a whole number",
}


def outcomes(cases: list[Case], folder: Path) -> list[Outcome]:
    """How each case ends; all run in forks of one process."""
    done = subprocess.run(
        [sys.executable, odd_overrides.__file__, str(folder)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    base, *results = [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]
    assert base.status == 0, base.err
    return results


def is_told(outcome: Outcome) -> bool:
    """Whether a command did its work, or refused in one line."""
    refused = outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    return outcome.status == 0 or (outcome.status in (1, 2) and refused)


def check(cases: list[Case], folder: Path) -> None:
    pairs = zip(cases, outcomes(cases, folder), strict=True)
    failed = [
        f"{case.command}.py {' '.join(case.arguments)}\n{o.status} {o.err[-1500:]}"
        for case, o in pairs
        if not is_told(o)
    ]
    assert not failed, "\n\n".join(failed)


@pytest.mark.slow
def test_known_slips_and_random_odd_values_are_work_done_or_one_line_that_names_the_option(tmp_path: Path) -> None:
    base = ("data.path=text.txt", *odd_overrides.TINY, "hydra.run.dir=run")
    slips = [Case("train", (*base, *typed.split())) for typed in KNOWN]
    cases = draw(seed=1, n=3)
    results = outcomes([*slips, *cases], tmp_path)
    for typed, outcome in zip(KNOWN, results, strict=False):
        assert outcome.err.startswith(f"error: {KNOWN[typed]}"), (typed, outcome)
        assert is_told(outcome), (typed, outcome)
    failed = [(case, o) for case, o in zip(cases, results[len(slips) :], strict=True) if not is_told(o)]
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_a_hundred_odd_values_are_work_done_or_one_line(seed: int, tmp_path: Path) -> None:
    check(draw(seed=seed, n=100), tmp_path)


@pytest.mark.slow
def test_every_objective_on_every_model_trains_or_says_what_it_needs(tmp_path: Path) -> None:
    cases = []
    for objective, data in odd_overrides.OBJECTIVES.items():
        for model in odd_overrides.MODELS:
            commands = [
                f"model={model}",
                f"objective={objective}",
                f"data.path={odd_overrides.DATA[data]}",
                f"data={data}",
            ]
            cases.append(Case("train", (*commands, *odd_overrides.sizes(model), *odd_overrides.needed(objective))))
    check(cases, tmp_path)
