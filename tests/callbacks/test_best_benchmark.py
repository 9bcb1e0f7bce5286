"""The best checkpoint and the end of a run by a benchmark: what the table of all measurements says, in parts too."""

import csv
import json
from pathlib import Path

import pytest
import torch

from genai_pl.errors import ConfigError
from genai_pl.training.watched_metrics import _find_benchmark
from tests.conftest import TINY

JOB = (*TINY, "optimizer=adamw", "optimizer.lr=2e-2", "scheduler=constant", "scheduler.warmup_steps=0", "logger=csv")
EVAL = ("data.path=text.txt", "eval.every_n_steps=2", "eval.tasks.held=held.txt", "trainer.val_check_interval=100")
BEST = ("callbacks.checkpoint.best=eval/held", "callbacks.checkpoint.keep=1", "callbacks.checkpoint.every_n_steps=5")
STOP = ("callbacks.early_stopping.patience=2", "callbacks.early_stopping.metric=eval/held/loss")
STEPS = 16


@pytest.fixture(autouse=True)
def texts(tmp_path: Path) -> None:
    """What is learned is not what is measured: the loss there falls, and rises again."""
    (tmp_path / "text.txt").write_text("abcdefgh" * 200)
    (tmp_path / "held.txt").write_text("hgfedcba aha gaga " * 4)


def losses(run: Path) -> dict[int, float]:
    """The benchmark's loss by step."""
    with (run / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["eval/held/loss"]) for row in csv.DictReader(file) if row["eval/held/loss"]}


def kept(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_checkpoint_of_the_best_measurement_is_kept_also_by_a_run_in_parts(command, tmp_path: Path) -> None:
    result = command("train", *JOB, *EVAL, *BEST, f"trainer.max_steps={STEPS}", "hydra.run.dir=whole")
    assert result.status == 0, result.err
    assert "best        eval/held/loss, lower is better: kept as whole/checkpoints/best.ckpt" in result.out
    whole = losses(tmp_path / "whole")
    best = min(whole, key=whole.__getitem__)
    assert (sorted(whole), 2 <= best < STEPS) == (list(range(2, STEPS + 1, 2)), True)
    stored = torch.load(tmp_path / "whole" / "checkpoints" / "best.ckpt", weights_only=True)
    assert stored["global_step"] == best
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert (results["best/step"], results["best/eval/held/loss"]) == (best, whole[best])
    # killed after a step that is measured, after one that is not, and resumed
    assert command("train", *JOB, *EVAL, *BEST, "trainer.max_steps=6", "hydra.run.dir=parts").status == 0
    for end in (9, STEPS):
        assert command("train", "resume=parts", f"trainer.max_steps={end}").status == 0
    parts = losses(tmp_path / "parts")
    assert {step: parts[step] for step in whole} == whole
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_ends_after_its_patience_of_measurements_also_in_parts_and_when_it_is_resumed(command, tmp_path) -> None:
    assert command("train", *JOB, *EVAL, f"trainer.max_steps={STEPS}", "hydra.run.dir=plain").status == 0
    best, bad, end = float("inf"), 0, STEPS
    for step, loss in losses(tmp_path / "plain").items():
        best, bad = (loss, 0) if loss < best else (best, bad + 1)
        if bad == 2:
            end = step
            break
    assert end < STEPS
    assert command("train", *JOB, *EVAL, *STOP, "trainer.max_steps=3", "hydra.run.dir=run").status == 0
    for options, last in (((), end), ((), end), (("callbacks.early_stopping.patience=99",), STEPS)):
        result = command("train", "resume=run", f"trainer.max_steps={STEPS}", *options)
        assert result.status == 0, result.err
        assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == last


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("callbacks.checkpoint.best=eval/held/los",), "no such metric, did you mean eval/held/loss?; eval.tasks measure"),
        (("callbacks.early_stopping.patience=1", "callbacks.early_stopping.metric=eval/hold"), "did you mean eval/held"),
        (("eval.tasks.c=tests.jsonl",), "eval.execute_code=false: eval.tasks.c.path=tests.jsonl has tests"),
        (("eval.tasks.c={path: sums.jsonl, max_new_tokens: many}",), "eval.tasks.c.max_new_tokens=many: "),
        (("eval.tasks.c={path: sums.jsonl, samples: 3, k: [4]}",), "eval.tasks.c.k=[4]: pass@k needs k from 1 to"),
        (("eval.tasks.c={path: sums.jsonl, limit: few}",), "eval.tasks.c.limit=few: expected a whole number"),
        (("eval.tasks.c={path: sums.jsonl, score: 'nowhere:f'}",), "eval.tasks.c.score=nowhere:f: cannot be imported"),
    ],
)  # fmt: skip
def test_a_metric_or_task_that_is_not_there_is_one_line_before_training(
    options: tuple[str, ...], said: str, command, tmp_path: Path
) -> None:
    (tmp_path / "tests.jsonl").write_text('{"prompt": "a", "test": "assert f()"}')
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": 2}')
    result = command("train", *JOB, *EVAL, *options, "hydra.run.dir=run")
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert said in result.err
    assert not (tmp_path / "run").exists()


def test_a_task_is_known_by_its_first_metric_and_no_task_measures_nothing() -> None:
    measured = {"qa": ["accuracy", "chance"]}
    assert _find_benchmark("best", "eval/qa", measured) == "eval/qa/accuracy"
    assert _find_benchmark("best", "eval/qa/chance", measured) == "eval/qa/chance"
    with pytest.raises(ConfigError, match="best=eval/qa: nothing is measured"):
        _find_benchmark("best", "eval/qa", {})


@pytest.mark.slow
def test_what_a_model_writes_while_it_trains_is_what_evaluate_finds_at_the_end(command, tmp_path: Path) -> None:
    rows = [{"prompt": "abc", "answer": "defgh"}, {"prompt": "fgh", "answer": "zzz"}]
    (tmp_path / "next.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "eval.tasks.next={path: next.jsonl, max_new_tokens: 5, samples: 4, k: [1, 2], temperature: 0.5}"
    options = (*JOB, "data.path=text.txt", "eval.every_n_steps=8", task, "trainer.max_steps=8", "hydra.run.dir=run")
    assert command("train", *options, "precision=fp32").status == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    same = ("data.max_new_tokens=5", "data.samples=4", "data.k=[1,2]", "data.temperature=0.5", "out=figures.json")
    assert command("evaluate", "checkpoint=run", "data.path=next.jsonl", *same).status == 0
    figures = json.loads(Path("figures.json").read_text())
    names = ("exact_match", "exact_match_low", "exact_match_high", "pass@2", "unfinished")
    assert {name: results[f"eval/next/{name}"] for name in names} == {name: figures[name] for name in names}
