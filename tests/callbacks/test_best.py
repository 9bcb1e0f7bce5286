"""The best checkpoint is the one that a table of all validations names, whatever a run goes through; early stopping likewise."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genai_pl.callbacks.best import EarlyStop, Validated
from tests.cli.test_commands import table
from tests.conftest import TINY

# letters without an order, which a model can only learn by heart, so that the validation loss falls and rises again
LR = ("optimizer=adamw", "optimizer.lr=2e-2", "scheduler=constant", "scheduler.warmup_steps=0")
JOB = (*TINY, *LR, "data.path=text.txt", "data.val_fraction=0.5", "trainer.val_check_interval=4", "logger=csv")
KEEP = ("callbacks.checkpoint.keep=99", "callbacks.checkpoint.every_n_steps=4")
BEST = ("callbacks.checkpoint.best=val/loss", "callbacks.export=best")
STEPS = 32


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the plain run of the first test waits for the others."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def losses(command, kept: Path, tmp_path: Path) -> dict[int, float]:
    """The validation losses by step of a plain run in `plain`, which keeps all checkpoints."""
    letters = random.Random(0)
    (tmp_path / "text.txt").write_text("".join(letters.choice("abcdefgh ") for _ in range(700)))
    if not (kept / "plain").exists():
        assert command("train", *JOB, *KEEP, f"trainer.max_steps={STEPS}", "hydra.run.dir=plain").status == 0
        shutil.copytree("plain", kept / "plain")
    shutil.copytree(kept / "plain", "plain", dirs_exist_ok=True)
    rows = table(tmp_path / "plain").items()
    return {step: float(row["val/loss"]) for step, row in rows if row["val/loss"]}


def checkpoint(run: Path, name: str) -> dict:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def history(run: Path, name: str = "last") -> list:
    callbacks = checkpoint(run, name)["callbacks"]
    return next(state["history"] for kind, state in callbacks.items() if kind.startswith("BestCheckpoint"))


def test_the_best_checkpoint_of_a_run_that_overfits_is_kept_exported_and_named(command, losses, tmp_path: Path) -> None:
    expected = min(losses, key=losses.__getitem__)
    assert 4 < expected < STEPS  # it does overfit
    result = command("train", *JOB, *BEST, f"trainer.max_steps={STEPS}", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "best        val/loss, lower is better: kept as run/checkpoints/best.ckpt, exported" in result.out
    run, plain = tmp_path / "run", checkpoint(tmp_path / "plain", f"step={expected:06d}")
    assert all(torch.equal(v, plain["state_dict"][k]) for k, v in checkpoint(run, "best")["state_dict"].items())
    exported = load_file(run / "model" / "model.safetensors")
    assert torch.equal(exported["model.embed_tokens.weight"], plain["state_dict"]["model.embed.weight"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("best.ckpt", "last.ckpt", f"step={expected:06d}.ckpt", "step=000028.ckpt", "step=000032.ckpt")
    ]
    results = json.loads((run / "results.json").read_text())
    assert (results["step"], results["best/step"]) == (STEPS, expected)
    assert results["best/val/loss"] == losses[expected]
    # by its short name, it is the exported model
    figures = []
    for name in ("run/best", "run", "run/last"):
        done = command("evaluate", f"checkpoint={name}", "data.path=text.txt")
        assert done.status == 0, done.err
        figures.append(done.out)
    assert figures[0] == figures[1] != figures[2]


@pytest.mark.slow
def test_a_run_in_parts_keeps_what_the_whole_one_keeps_and_an_earlier_step_its_own_best(
    command, losses, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("train", *JOB, *BEST, f"trainer.max_steps={STEPS}", "hydra.run.dir=whole").status == 0
    assert command("train", *JOB, *BEST, "trainer.max_steps=16", "hydra.run.dir=parts").status == 0
    for end in (20, STEPS):
        result = command("train", "resume=parts", f"trainer.max_steps={end}")
        assert result.status == 0, result.err
    assert history(parts) == history(whole)
    assert history(whole) == [[step, loss] for step, loss in losses.items() if step < STEPS]
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (parts, whole)]
    assert names[0] == names[1]
    assert (parts / "checkpoints" / "best.ckpt").samefile(
        parts / "checkpoints" / f"step={min(losses, key=losses.__getitem__):06d}.ckpt"
    )
    # going back to an earlier step: its best checkpoint counts again
    assert command("train", *JOB, *BEST, *KEEP, "trainer.max_steps=16", "hydra.run.dir=back").status == 0
    first = command("train", "resume=back/checkpoints/step=000004.ckpt", "trainer.max_steps=5")
    assert first.status == 0, first.err
    assert checkpoint(tmp_path / "back", "best")["global_step"] in (4, 5)


def waited(losses: dict[int, float], patience: int, min_delta: float) -> int:
    """The step after which a loop over losses stops, by the definition of Prechelt 1998 with an absolute threshold."""
    best, bad = float("inf"), 0
    for step, loss in losses.items():
        best, bad = (loss, 0) if loss < best - min_delta else (best, bad + 1)
        if bad == patience:
            return step
    raise AssertionError("it never stops")


@pytest.mark.slow
def test_a_sweep_stops_each_job_where_its_patience_ends_and_counts_it_as_finished(
    command, losses, tmp_path: Path
) -> None:
    stop = ("callbacks.early_stopping.patience=3", "callbacks.early_stopping.min_delta=0.01")
    expected = waited(losses, 3, 0.01)
    assert expected < STEPS
    result = command("train", "-m", *JOB, *stop, f"trainer.max_steps={STEPS},{STEPS + 1}", "hydra.sweep.dir=sweep")
    assert result.status == 0, result.err
    assert f"early stop  at step {expected}: val/loss has not improved in 3 validations" in result.out
    for job in "01":
        results = json.loads((tmp_path / "sweep" / job / "results.json").read_text())
        assert (results["step"], results["stopped_early"]) == (expected, True)
    again = command("train", "-m", "resume=sweep")
    assert again.out.count("is finished: skipped") == 2


def test_a_run_stops_where_its_patience_ends_also_in_parts_and_goes_on_with_more(command, losses, tmp_path) -> None:
    stop = ("callbacks.early_stopping.patience=3", "callbacks.early_stopping.min_delta=0.01")
    expected = waited(losses, 3, 0.01)
    assert command("train", *JOB, *stop, f"trainer.max_steps={expected - 6}", "hydra.run.dir=parts").status == 0
    for options, end in (((), expected), ((), expected), (("callbacks.early_stopping.patience=9",), STEPS)):
        result = command("train", "resume=parts", f"trainer.max_steps={STEPS}", *options)
        assert result.status == 0, result.err
        assert json.loads((tmp_path / "parts" / "results.json").read_text())["step"] == end


def test_an_improvement_is_finite_and_above_min_delta_and_a_repeated_validation_counts_once() -> None:
    stop = EarlyStop("val/accuracy", greater=True, patience=2, min_delta=0.1)
    stop.history = [Validated(n, value) for n, value in enumerate((0.5, float("nan"), 0.55, 0.61, 0.7))]
    assert [seen.step for seen in stop.improvements()] == [0, 2, 3, 4]
    assert [seen.step for seen in stop.improvements(0.1)] == [0, 3]
    assert stop.waited == 1


def test_minutes_are_counted_from_the_last_checkpoint(command, losses, tmp_path: Path) -> None:
    options = ("callbacks.checkpoint.every_n_steps=null", "callbacks.checkpoint.keep=99", "trainer.max_steps=5")
    for minutes, steps in (("1e-9", 5), ("1000", 1)):
        run = f"minutes{steps}"
        result = command(
            "train", *JOB, *options, f"callbacks.checkpoint.every_n_minutes={minutes}", f"hydra.run.dir={run}"
        )
        assert result.status == 0, result.err
        assert len(list((tmp_path / run / "checkpoints").glob("step=*.ckpt"))) == steps


def test_the_mean_of_the_newest_checkpoints_is_that_of_their_weights(command, losses, tmp_path: Path) -> None:
    result = command("export", "checkpoint=plain", "average=3", "out=mean")
    assert result.status == 0, result.err
    assert "average     of steps 32, 28, 24" in result.out
    weights = [checkpoint(tmp_path / "plain", f"step={step:06d}")["state_dict"] for step in (24, 28, 32)]
    exported = load_file(tmp_path / "mean" / "model.safetensors")
    for name, ours in {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}.items():
        expected = torch.stack([w[f"model.{ours}"].double() for w in weights]).mean(0)
        torch.testing.assert_close(exported[name].double(), expected, rtol=0, atol=1e-7)
    few = command("export", "checkpoint=plain", "average=30", "out=few")
    assert (few.status, few.err.count("\n")) == (1, 1)
    assert "average=30: plain/checkpoints holds 8; callbacks.checkpoint.keep=30" in few.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("callbacks.export=best",), "callbacks.export=best: set callbacks.checkpoint.best=val/loss"),
        (("callbacks.checkpoint.best=train/loss",), "expected a metric of the validation"),
        (("callbacks.checkpoint.best=val/height",), "callbacks.checkpoint.mode=null: the name val/height does not tell"),
        (("callbacks.checkpoint.best=val/los",), "what is better: did you mean val/loss? If not, set it to min or max"),
        (("callbacks.checkpoint.best=val/loss", "trainer.limit_val_batches=0"), "nothing is validated"),
        (("callbacks.early_stopping.patience=0",), "callbacks.early_stopping.patience=0: expected"),
        (("callbacks.early_stopping.patience=1", "callbacks.early_stopping.metric=val/los",
          "callbacks.early_stopping.mode=min", "trainer.val_check_interval=2"),
         "callbacks.early_stopping.metric=val/los: no such metric, did you mean val/loss?"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_one_line(options: tuple[str, ...], said: str, command) -> None:
    result = command("train", *TINY, *options)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert said in result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [("strategy=ddp",), ("strategy=fsdp",), ("strategy=fsdp", "strategy.sharded_checkpoints=true")]
)
def test_the_best_of_several_processes_is_exported_too(kind: tuple[str, ...], command, losses, tmp_path: Path) -> None:
    options = (*JOB, *kind, "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2")
    result = command("train", *options, *BEST, f"trainer.max_steps={STEPS}", "hydra.run.dir=run")
    assert result.status == 0, result.err
    rows = {step: row["val/loss"] for step, row in table(tmp_path / "run").items() if row["val/loss"]}
    expected = min(rows, key=lambda step: float(rows[step]))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["best/step"] == expected < STEPS
    assert command("export", "checkpoint=run/best", "out=best").status == 0
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "run/model"))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
