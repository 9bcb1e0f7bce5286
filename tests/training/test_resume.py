"""A run that is taken up equals the one that never stopped, to the last bit; what cannot count is said or refused."""

import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genai_pl.atomic_io import claimed
from genai_pl.callbacks import StepCheckpoint, newest_checkpoints
from genai_pl.errors import ConfigError, UserError
from genai_pl.training.resume import _print_changes, replay
from tests.cli.test_commands import table
from tests.conftest import ROOT, some

SMALL = (
    *("model.n_layer=1", "model.n_embd=32", "model.max_seq_len=32", "model.dropout=0.1", "tokenizer=byte"),
    *("data.batch_size=2", "data.path=text.txt", "optimizer=adamw", "scheduler.warmup_steps=2"),
    *("trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", "callbacks.samples.every_n_steps=null"),
    *("callbacks.checkpoint.keep=99", "callbacks.export=false", "logger=csv"),
)
N_BATCHES = 8  # of an epoch of the text


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(f"word{i} is {i * i}." for i in range(40)))
    return tmp_path


def weights(run: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_equal(run: str, expected: str) -> None:
    """The last weights, and every row of the table but for validations that one of them alone has made."""
    ours, theirs = table(Path(run)), table(Path(expected))
    assert list(ours) == list(theirs)
    for step, row in theirs.items():
        assert {k: v for k, v in ours[step].items() if k.startswith("train/")} == {
            k: v for k, v in row.items() if k.startswith("train/")
        }
        both = [k for k in row if k.startswith("val/") and row[k] and ours[step].get(k)]
        assert [ours[step][k] for k in both] == [row[k] for k in both]
    assert all(map(torch.equal, weights(run).values(), weights(expected).values()))


# what a run is started with, and how far it goes before it is taken up
KINDS = {
    "table": (),
    "accumulate": ("trainer.accumulate_grad_batches=3",),
    "stream": ("data.streaming=true", "data.val_path=text.txt", "data.block_rows=5"),
    "lora": ("peft=lora",),
    "muon": ("optimizer=muon",),
    "ema": ("callbacks=ema",),
}
LENGTHS = ("max_steps", "max_epochs")


def draws() -> list[tuple[str, str, int, int, int]]:
    """Kind of run, what measures its length, where it stops, where it ends, and steps between checkpoints."""
    draw = random.Random(7)
    numbers = []
    for kind in KINDS:
        measure = draw.choice(LENGTHS[: 1 if kind == "stream" else 2])
        stop = draw.randint(1, 11) if measure == "max_steps" else draw.randint(1, 2)
        end = stop + (draw.randint(1, 12) if measure == "max_steps" else 1)
        numbers.append((kind, measure, stop, end, draw.randint(2, 5)))
    return numbers


@pytest.mark.parametrize(
    ("kind", "measure", "stop", "end", "every"), some([*draws(), ("table", "max_steps", 8, 19, 8)])
)
def test_a_run_that_is_made_longer_equals_the_long_one(
    kind: str, measure: str, stop: int, end: int, every: int, place: Path, command
) -> None:
    arguments = ("train", *SMALL, *KINDS[kind], f"callbacks.checkpoint.every_n_steps={every}", "scheduler=constant")
    arguments += ("trainer.val_check_interval=3",)
    assert command(*arguments, f"trainer.{measure}={end}", "hydra.run.dir=whole").status == 0
    assert command(*arguments, f"trainer.{measure}={stop}", "hydra.run.dir=run").status == 0
    result = command("train", "resume=run", f"trainer.{measure}={end}")
    assert result.status == 0, result.err
    assert f"changed     trainer.{measure}={end} (was {stop})" in result.out
    assert_equal("run", "whole")


def test_any_checkpoint_of_a_run_leads_to_its_end(place: Path, command) -> None:
    arguments = (
        "train",
        *SMALL,
        "trainer.max_steps=12",
        "trainer.val_check_interval=4",
        "trainer.accumulate_grad_batches=3",
    )
    assert command(*arguments, "callbacks.checkpoint.every_n_steps=1", "hydra.run.dir=whole").status == 0
    for step in random.Random(3).sample(range(1, 12), 3):
        shutil.copytree("whole", "run")
        result = command("train", f"resume=run/checkpoints/step={step:06d}.ckpt")
        assert result.status == 0, result.err
        assert_equal("run", "whole")
        shutil.rmtree("run")


def test_the_rows_of_a_step_may_be_split_otherwise_on_resume(place: Path, command) -> None:
    arguments = ("train", *SMALL, "model.dropout=0", "trainer.max_steps=12", "callbacks.checkpoint.every_n_steps=1")
    assert command(*arguments, "data.batch_size=4", "hydra.run.dir=whole").status == 0
    for step in (2, 3):  # in the middle of an epoch of 4 steps
        shutil.copytree("whole", "run")
        split = ("data.batch_size=2", "trainer.accumulate_grad_batches=2")
        result = command("train", f"resume=run/checkpoints/step={step:06d}.ckpt", *split)
        assert result.status == 0, result.err
        for at, row in table(Path("whole")).items():
            ours = table(Path("run"))[at]
            assert float(ours["train/loss"]) == pytest.approx(float(row["train/loss"]), rel=1e-5), at
            assert ours["train/tokens_seen"] == row["train/tokens_seen"]
        shutil.rmtree("run")


def test_output_dir_is_the_run_folder_whole(place: Path, command) -> None:
    result = command("train", *SMALL, "callbacks.export=true", "trainer.max_steps=2", "output_dir=mine/run")
    assert result.status == 0, result.err
    names = {path.name for path in (place / "mine" / "run").iterdir()}
    assert names == {".hydra", "checkpoints", "metrics.csv", "model", "report.html", "results.json", "train.log"}
    assert not (place / "outputs").exists()
    assert command("train", "resume=mine/run", "trainer.max_steps=3").status == 0
    assert max(table(Path("mine/run"))) == 3
    both = command("train", *SMALL, "output_dir=a", "hydra.run.dir=b")
    assert both.err == "error: output_dir and hydra.run.dir name the same folder: give one of them\n"
    assert replay(["-m", "seed=1,2", "output_dir=swept"]) == ["-m", "seed=1,2", "hydra.sweep.dir=swept"]


def test_a_run_at_its_last_step_is_exported_and_nothing_is_trained(place: Path, command) -> None:
    arguments = ("train", *SMALL, "trainer.max_steps=3", "hydra.run.dir=run")
    assert command(*arguments).status == 0
    before, rows = weights("run"), table(Path("run"))
    result = command("train", "resume=run", "callbacks.export=true")
    assert result.status == 0, result.err
    assert "already at step 3 of 3" in result.out
    assert (place / "run" / "model" / "config.json").exists()
    assert table(Path("run")) == rows
    assert all(map(torch.equal, weights("run").values(), before.values()))
    result = command("train", "resume=run", "trainer.max_steps=2")
    assert result.status == 0
    assert "the run is at step 3, past trainer.max_steps=2: nothing is trained" in result.out


def test_a_rate_a_decay_and_a_schedule_that_are_typed_on_resume_count(place: Path, command) -> None:
    arguments = ("train", *SMALL, "trainer.max_steps=3", "hydra.run.dir=run", "scheduler=constant")
    assert command(*arguments).status == 0
    shutil.copytree("run", "same")
    assert command("train", "resume=same", "trainer.max_steps=5").status == 0
    for change in ("optimizer.lr=1e-2", "optimizer.betas=[0.5,0.6]", "scheduler=linear"):
        shutil.copytree("run", "changed")
        result = command("train", "resume=changed", "trainer.max_steps=5", change)
        assert result.status == 0, result.err
        assert f"changed     {change} (was" in result.out
        assert not all(map(torch.equal, weights("changed").values(), weights("same").values()))
        group = torch.load("changed/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]
        if change == "optimizer.lr=1e-2":  # the constant schedule has warmed up by then
            assert float(table(Path("changed"))[4]["train/lr"]) == 1e-2
        if "betas" in change:
            assert tuple(group["betas"]) == (0.5, 0.6)
        shutil.rmtree("changed")


@pytest.mark.parametrize(
    ("change", "message"),
    some(
        [
            ("seed=1", "seed=1: the run was begun with 0"),
            ("model.n_embd=64", "model.n_embd=64: the run was begun with 32"),
            ("optimizer=sgd", "optimizer._target_=genai_pl.optim.sgd"),
            ("peft=lora", "peft._target_=genai_pl.peft.lora: the run was begun with None"),
            ("data.seq_len=16", "data.seq_len=16: the run was begun with 32"),
            ("data.shuffle=false", "data.shuffle=False: the run was begun with True"),
            ("tokenizer=bpe", "tokenizer.kind=bpe: the run was begun with byte"),
            ("data.path=/nope", "/nope"),
            ("data.batch_size=4", "data.batch_size: the checkpoint stands at row 6"),
            ("trainer.accumulate_grad_batches=2", "trainer.accumulate_grad_batches: the checkpoint stands at batch 3"),
            ("+trainer.nonsense=1", "trainer"),
            ("init_from=run", "init_from=run: has no effect beside resume="),
        ]
    ),
)
def test_what_cannot_change_in_a_run_is_one_line_and_leaves_the_folder_as_it_was(
    change: str, message: str, place: Path, command
) -> None:
    assert command("train", *SMALL, "trainer.max_steps=3", "hydra.run.dir=run").status == 0
    files = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    result = command("train", "resume=run", "trainer.max_steps=5", change)
    assert result.status in (1, 2), result
    assert (result.err.startswith("error: "), result.err.count("\n")) == (True, 1), result.err
    assert message in result.err
    assert {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()} == files


def test_data_that_changed_are_refused_until_they_are_named_again(place: Path, command) -> None:
    assert command("train", *SMALL, "trainer.max_steps=3", "hydra.run.dir=run").status == 0
    stat = (place / "text.txt").stat()
    (place / "text.txt").write_text((place / "text.txt").read_text().replace("word3", "WORD3"))
    os.utime("text.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = command("train", "resume=run", "trainer.max_steps=4")
    assert result.status == 1
    assert re.fullmatch(
        r"error: data\.path: its contents have changed since .*; type data\.path= again .*\n", result.err
    )
    result = command("train", "resume=run", "trainer.max_steps=4", "data.path=text.txt")
    assert result.status == 0, result.err
    assert "the contents of data.path" in result.out


def test_auto_takes_the_run_that_was_saved_last_wherever_it_lies_and_whatever_files_say(place: Path, command) -> None:
    first = ("train", *SMALL, "trainer.max_steps=2")
    assert command(*first, "hydra.run.dir=outputs/old").status == 0
    assert command(*first, "output_dir=mine/new", "callbacks.checkpoint.every_n_steps=1").status == 0
    for path in Path("outputs").rglob("*"):
        os.utime(path, (time.time() + 1000, time.time() + 1000))
    assert "hydra.run.dir=mine/new" in replay(["resume=auto"])
    assert "optimizer=adamw" in replay(["resume=auto", "hydra.run.dir=outputs/old"])
    shutil.copytree("mine/new", "copy")  # all files have new times, in any order
    os.utime("copy/checkpoints/step=000001.ckpt", (time.time() + 9, time.time() + 9))
    assert newest_checkpoints(Path("copy/checkpoints"))[-1].name == "step=000001.ckpt"
    (Path("copy") / "checkpoints" / "last.ckpt").unlink()
    result = command("train", "resume=copy", "trainer.max_steps=3")
    assert "copy/checkpoints/step=000002.ckpt: step 2" in result.out


def test_checkpoints_are_sorted_by_number_past_a_million_steps(tmp_path: Path) -> None:
    callback = StepCheckpoint(str(tmp_path), every_n_steps=1, keep=2)
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        path = tmp_path / f"step={step:06d}.ckpt"
        path.write_text(str(step))
        callback.written(path)
    assert sorted(p.name for p in tmp_path.glob("step=*")) == ["step=1000000.ckpt", "step=1000001.ckpt"]
    assert (tmp_path / "last.ckpt").read_text() == "1000001"


def test_a_folder_is_written_by_one_process_which_the_other_names(tmp_path: Path) -> None:
    code = f"from genai_pl.atomic_io import claimed; from pathlib import Path\nwith claimed(Path({str(tmp_path)!r})): input()"
    process = subprocess.Popen([sys.executable, "-c", f"{code}"], stdin=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        lock = tmp_path / ".lock"
        while process.poll() is None and not (lock.exists() and lock.read_text()):
            time.sleep(0.01)
        with pytest.raises(UserError, match=rf": process {process.pid} on .* is writing this run"), claimed(tmp_path):
            pass
        process.kill()
        process.wait()
        with claimed(tmp_path):  # what a killed process left claims nothing
            assert lock.read_text().startswith(str(os.getpid()))
        assert not lock.exists()
    finally:
        process.kill()
        process.communicate()


def test_a_new_run_does_not_start_in_the_folder_of_an_old_one(place: Path, command) -> None:
    arguments = ("train", *SMALL, "trainer.max_steps=2")
    assert command(*arguments, "hydra.run.dir=run").status == 0
    files = sorted(Path("run").rglob("*"))
    for name in ("hydra.run.dir=run", "output_dir=run"):
        result = command(*arguments, name)
        assert result.err == "error: run: holds a run already; continue it with resume=run, or name another folder\n"
    assert sorted(Path("run").rglob("*")) == files
    with pytest.raises(ConfigError, match="holds a run already"):
        replay(["seed=1", "output_dir=run"])


def test_what_lay_beyond_the_step_that_a_run_goes_on_from_is_set_aside(place: Path, command) -> None:
    arguments = ("train", *SMALL, "trainer.max_steps=6", "callbacks.checkpoint.every_n_steps=2", "hydra.run.dir=run")
    assert command(*arguments).status == 0
    assert command("train", "resume=run/checkpoints/step=000002.ckpt", "trainer.max_steps=3").status == 0
    names = sorted(path.name for path in Path("run/checkpoints").glob("*step=*"))
    assert names == ["aside-step=000004.ckpt", "aside-step=000006.ckpt", "step=000002.ckpt", "step=000003.ckpt"]
    assert max(table(Path("run"))) == 3


def test_quotes_around_a_value_are_no_change_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    _print_changes(["data.path='s3://bucket/a b'", "seed=1"], ["data.path=s3://bucket/a b", "seed=2"])
    assert capsys.readouterr().out == "changed     seed=2 (was 1)\n"
