"""Process reward models as commands: trained, exported to transformers' class with equal scores, evaluated, refused, resumed."""

import csv
import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from genai_pl.data.steps import split_steps
from genai_pl.data.stepwise import StepwiseDataModule
from tests.conftest import TINY

MODEL = ("model=llama", *TINY, "model.n_head=4", "data.batch_size=8", "optimizer.lr=1e-2", "objective=process_reward")
ROWS = [{"prompt": "say a:", "completions": ["a", "ab"[n % 2]], "labels": [True, n % 2 == 0]} for n in range(40)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"data.path={path.name}"


def test_steps_are_learned_and_transformers_gives_their_scores(command, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", ROWS)
    result = command("train", *MODEL, rows, "trainer.max_steps=30", "hydra.run.dir=run")
    assert result.status == 0, result.err
    with (tmp_path / "run/metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["val/accuracy"]) == float(last["val/recall_incorrect"]) == 1
    # transformers alone, on TRL's tokens of a row
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "run/model")
    assert theirs.config.id2label == {0: "incorrect", 1: "correct"}
    parts = [tokenizer.encode(part, add_special_tokens=False) for part in ("a", "\n", "b", "\n")]
    ids = torch.tensor([[*tokenizer.encode("say a:"), *chain(*parts)]])
    with torch.no_grad():
        expected = theirs(ids).logits.softmax(-1)[0, :, 1]
    said = json.loads(command("generate", "checkpoint=run", "score=true", "query=say a:", "prompt=a\nb").out)
    assert said["steps"] == ["a", "b"]
    assert said["scores"] == pytest.approx([expected[-3].item(), expected[-1].item()], abs=1e-5)
    assert said["scores"][0] > 0.5 > said["scores"][1]
    measured = command("evaluate", "checkpoint=run", rows)
    assert measured.status == 0, measured.err
    assert "40 answers, 80 steps" in measured.out
    assert "f1" in measured.out


def test_rows_have_the_steps_that_a_reward_divides_an_answer_into(tmp_path: Path) -> None:
    # each row beside the text whose steps a reward would score
    rows = [
        (
            {"completions": ["", "a", " ", "b", "\t"], "labels": ["false", "TRUE", 0, "0.5", False]},
            ["a", "b"],
            [1, 0.5],
        ),
        ({"completions": ["c"], "labels": [0]}, ["c"], [0]),
    ]
    path = tmp_path / "rows.jsonl"
    write(path, [{"prompt": "p", **row} for row, _, _ in rows])
    options = {"step_separator": "\n", "train_on_last_step_only": False, "seq_len": 64, "val_fraction": 0.5}
    loading = {"batch_size": 1, "val_batch_size": None, "workers": 0, "shuffle": False, "seed": 0, "val_path": None}
    columns = {name: name for name in ("prompt", "completions", "labels")}
    data = StepwiseDataModule(path=str(path), **columns, **options, **loading)
    for read, (row, steps, labels) in zip(data.read_table(data.source), rows, strict=True):
        assert (
            json.loads(read["completions"]) == steps == [s for s, _ in split_steps("\n".join(row["completions"]), "\n")]
        )
        assert json.loads(read["labels"]) == labels
    assert data.n_blank == 3


def test_the_last_label_alone_and_batches_of_one_step(command, tmp_path: Path) -> None:
    def losses(run: str) -> list[float]:
        with (tmp_path / run / "metrics.csv").open() as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file)]

    common = (*MODEL, write(tmp_path / "rows.jsonl", ROWS), "data.train_on_last_step_only=true")
    assert command("train", *common, "hydra.run.dir=one").status == 0
    split = ("data.batch_size=2", "trainer.accumulate_grad_batches=4", "hydra.run.dir=split")
    assert command("train", *common, *split).status == 0
    assert losses("one") == pytest.approx(losses("split"), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"prompt": "a", "completions": ["b"], "labels": []}, (), "0 labels for 1 steps"),
        ({"prompt": "a", "completions": ["b"], "labels": [-1]}, (), "-1 is no label: give a number from 0 to 1"),
        ({"prompt": "a", "completions": ["b"], "labels": [None]}, (), "missing (null) is no label"),
        ({"prompt": "a", "completions": ["", " "], "labels": [0, 1]}, (), "all steps are blank: leave the row out"),
        (
            {"prompt": "a", "completions": ["b"], "labels": [1]},
            ("data.step_separator=''",),
            "data.step_separator is empty",
        ),
        ({"prompt": "a" * 50, "completions": ["b"], "labels": [1]}, (), "data.seq_len=32 tokens; raise it"),
    ],
)
def test_a_bad_row_is_one_line(row: dict, arguments: tuple, message: str, command, tmp_path: Path) -> None:
    result = command("train", *MODEL, write(tmp_path / "rows.jsonl", [row] * 20), *arguments)
    assert (result.status in (1, 2), result.err.count("\n")) == (True, 1), result.err
    assert message in result.err


def test_rows_are_inspected(command, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    result = command("data", "inspect", "rows.jsonl", "tokenizer=byte", "picture=null", "rows=1", *TINY[:3])
    assert result.status == 0, result.err
    assert "labels: 1 1\n" in result.out or "labels: 1 0\n" in result.out


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_a_policy_learns_from_steps_and_resumes(objective: str, command, tmp_path: Path) -> None:
    def last(run: str) -> dict[str, float]:
        with (tmp_path / run / "metrics.csv").open() as file:
            return list(csv.DictReader(file))[-1]

    assert command("train", *MODEL, write(tmp_path / "rows.jsonl", ROWS), "hydra.run.dir=judge").status == 0
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"{n}:"} for n in range(12)])
    sizes = ["objective.max_new_tokens=6", "objective.minibatch_size=8", "data.batch_size=4"]
    sizes += ["objective.group_size=2"] if objective == "grpo" else ["objective.epochs=2"]
    common = ["model=llama", *TINY[:4], *TINY[6:], "model.n_head=4", f"objective={objective}", prompts, *sizes]
    common += ["objective.reward=judge"]
    common += ["objective.kl_target=0.1"] if objective == "ppo" else []  # an adaptive coefficient is in the checkpoint
    common += ["trainer.max_steps=8", "callbacks.checkpoint.every_n_steps=4"]
    result = command("train", *common, "hydra.run.dir=whole")
    assert result.status == 0, result.err
    assert 0 < float(last("whole")["objective/scores"]) < 6  # sums of probabilities
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    result = command("train", "resume=half/checkpoints/step=000004.ckpt")
    assert result.status == 0, result.err
    names = ["objective/scores", "train/loss", "train/grad_norm", "objective/kl"]
    names += ["loss/value", "objective/kl_coef"] if objective == "ppo" else []
    assert [last("half")[name] for name in names] == [last("whole")[name] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("objective.advantage=rloo",), "set objective.advantage=group, or objective.step_rewards"),
        (("objective.step_rewards=best",), "is not one of dense, min, last, mean, product"),
    ],
)
def test_what_steps_cannot_do_is_one_line(arguments: tuple, message: str, command, tmp_path: Path) -> None:
    assert command("train", *MODEL, write(tmp_path / "rows.jsonl", ROWS), "hydra.run.dir=judge").status == 0
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"{n}:"} for n in range(12)])
    common = ("model=llama", *TINY, "model.n_head=4", "objective=grpo", prompts, "objective.reward=judge")
    result = command("train", *common, "objective.max_new_tokens=6", *arguments)
    assert (result.status in (1, 2), result.err.count("\n")) == (True, 1), result.err
    assert message in result.err
