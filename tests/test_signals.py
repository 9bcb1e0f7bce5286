"""Signals end a command at once if nothing is to be saved, else after saving; a resumed run equals an uninterrupted one."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import genai_pl.exporting
from genai_pl import signals, train
from genai_pl.callbacks import Console
from genai_pl.data import table_store as store
from genai_pl.data.table_store import cache_folder
from genai_pl.data.text import TextDataModule
from genai_pl.modules import rollout_module
from genai_pl.signals import Stopped, exit_status, handle_signals
from genai_pl.training import build, fit
from tests.conftest import ROOT, TINY

RUN = (
    *TINY,
    "trainer.max_steps=6",
    "trainer.val_check_interval=2",
    "trainer.accumulate_grad_batches=2",
    "model.dropout=0.1",
    "logger=csv",
)
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}  # 128 + the number of SIGTERM, and of SIGINT
Send = Callable[..., None]


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch) -> Send:
    """`send(owner, name, signum, nth)` makes the nth call of a function send a signal to this process first."""

    def arrange(owner: object, name: str, signum: int = signal.SIGTERM, nth: int = 1) -> None:
        original, calls = getattr(owner, name), []

        def begin(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == nth:
                signal.raise_signal(signum)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, begin)

    return arrange


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a signal."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("whole"))
    run = train(*RUN, "hydra.run.dir=run").absolute()
    os.chdir(before)
    return run


def figures(run: Path) -> dict[str, dict[str, str]]:
    """Losses and norms by step, which do not depend on the clock."""
    with (run / "metrics.csv").open() as file:
        shown = ("train/loss", "train/grad_norm", "val/", "objective/")
        rows = {row["step"]: row for row in csv.DictReader(file)}
    return {step: {k: v for k, v in row.items() if k.startswith(shown)} for step, row in rows.items()}


def assert_equal(run: Path, whole: Path) -> None:
    assert figures(run) == figures(whole)
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert all((weights[name] == value).all() for name, value in expected.items())


@pytest.mark.parametrize("signum", STATUS)
def test_a_command_that_has_nothing_to_save_ends_at_once_with_one_line(signum: int, capfd) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as end, handle_signals():
        signal.raise_signal(signum)
    assert end.value.code == STATUS[signum] == exit_status(signum)
    assert capfd.readouterr().err == f"stopped     by {signal.Signals(signum).name}\n"
    assert signal.getsignal(signum) is before


def test_where_a_run_is_to_be_saved_a_signal_waits_and_a_second_ctrl_c_does_not() -> None:
    with handle_signals():
        signals.save_first(lambda: "")
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert signals.received_signal() == signal.SIGTERM
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


LETTERS = """
def vowels(prompts, completions, **_):
    return [sum(letter in "aeiou" for letter in text) for text in completions]
"""
HANGING = """
import ctypes, os, signal
from pathlib import Path
from genai_pl import signals
from genai_pl.atomic_io import write_atomic

def hang(path):
    path.write_text("half")
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # as in a collective, the main thread runs no handler
    for signum in SENT:
        os.kill(os.getpid(), signum)
        while signals.received_signal() is None:  # two that wait at a time count as one
            pass
    ctypes.CDLL(None).sleep(600)

with signals.handle_signals():
    signals.end_at_once("nothing", grace_period=PERIOD)
    signals.save_first(lambda: "saved in last.ckpt")
    write_atomic(Path("model"), hang)
"""


@pytest.mark.parametrize(
    ("sent", "period", "status"),
    [([signal.SIGTERM], 0.1, 143), ([signal.SIGUSR1], 0.1, 143), ([signal.SIGINT] * 2, 600, 130)],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C twice"],
)
def test_a_process_that_hangs_ends_by_itself_and_leaves_nothing_half_written(
    sent: list[int], period: float, status: int, tmp_path: Path
) -> None:
    code = f"SENT, PERIOD = {[int(signum) for signum in sent]}, {period}\n{HANGING}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status
    # two threads say one line each
    assert f"stopped     by {signal.Signals(sent[0]).name}: saved in last.ckpt" in done.stderr.splitlines()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("hook", "signum", "nth", "step"),
    [
        pytest.param("on_train_batch_start", signal.SIGTERM, 1, 1, id="first step"),
        pytest.param("on_train_batch_start", signal.SIGUSR1, 6, 3, id="inside an accumulation window"),
        pytest.param("on_train_batch_end", signal.SIGINT, 8, 4, id="before a validation"),
        pytest.param("on_validation_batch_start", signal.SIGTERM, 3, 4, id="validation"),
        pytest.param("on_validation_batch_start", signal.SIGINT, 6, 6, id="validation of the last step"),
    ],
)
def test_a_run_that_a_signal_stopped_is_saved_and_goes_on_as_if_it_had_not(
    hook: str, signum: int, nth: int, step: int, whole: Path, command, send: Send, tmp_path: Path
) -> None:
    send(Console, hook, signum, nth)
    stopped = command("train", *RUN, "hydra.run.dir=run")
    assert stopped.status == STATUS[signum], stopped.err
    line = f"stopped     by {signal.Signals(signum).name} at step {step} of 6, saved in run/checkpoints/last.ckpt"
    assert line in stopped.out + stopped.err
    assert stopped.out.splitlines()[-1] == "next        python train.py resume=run"
    assert not (tmp_path / "run" / "results.json").exists()
    assert command("train", "resume=run").status == 0
    assert (tmp_path / "run" / "results.json").exists()
    assert_equal(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(build, "build_module"), (TextDataModule, "prepare"), (Console, "setup")],
    ids=["model", "data", "setup"],
)
def test_before_training_a_signal_ends_the_run_at_once(owner: object, name: str, command, send: Send, tmp_path: Path):
    send(owner, name)
    result = command("train", *RUN, "hydra.run.dir=run")
    assert result.status == 143
    assert result.err == "stopped     by SIGTERM: training had not begun, nothing was saved\n"
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert command("train", *RUN, "trainer.max_steps=2", "hydra.run.dir=run").status == 0


def test_a_table_that_a_signal_interrupts_is_not_left_half_written(command, send: Send, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "A?", "completion": "B."}\n' * 20, encoding="utf-8")
    send(store, "_batches")
    arguments = (*TINY, "objective=sft", "data=chat", "data.path=rows.jsonl", "hydra.run.dir=run")
    assert command("train", *arguments).status == 143
    assert not [path for path in cache_folder().iterdir() if path.name.startswith(".")]
    assert command("train", *arguments).status == 0


def test_a_run_that_finished_all_the_same_is_a_success(command, send: Send, tmp_path: Path) -> None:
    send(fit, "export_run")
    result = command("train", *RUN, "hydra.run.dir=run")
    assert result.status == 0
    assert (tmp_path / "run" / "results.json").exists()
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert "python generate.py checkpoint=run" in result.out


def test_a_second_ctrl_c_in_an_export_ends_it_and_leaves_nothing_of_it(command, send: Send, tmp_path: Path) -> None:
    send(fit, "export_run", signal.SIGINT)
    send(genai_pl.exporting, "save_tokenizer", signal.SIGINT)
    result = command("train", *RUN, "hydra.run.dir=run")
    assert result.status == 130
    last = "stopped     by SIGINT: saved in run/checkpoints/last.ckpt; python train.py resume=run"
    assert result.err.splitlines()[-1] == last
    assert not [path.name for path in (tmp_path / "run").iterdir() if "model" in path.name]
    assert not (tmp_path / "run" / "results.json").exists()
    assert command("train", "resume=run").status == 0
    assert (tmp_path / "run" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("owner", "name"), [(Console, "on_train_batch_start"), (fit, "write_results")], ids=["in", "after"]
)
def test_a_sweep_ends_with_the_job_that_a_signal_came_to(owner: object, name: str, command, send: Send, tmp_path: Path):
    send(owner, name)
    result = command("train", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=sweep")
    assert result.status == 143, result.err
    assert not (tmp_path / "sweep" / "1" / "checkpoints").exists()
    assert command("train", "-m", "resume=auto", "hydra.sweep.dir=sweep").status == 0
    assert all((tmp_path / "sweep" / job / "results.json").exists() for job in "01")


GRPO = (
    *("objective=grpo", "objective.group_size=2", "objective.max_new_tokens=4", "objective.reward=letters:vowels"),
    *("data.path=prompts.jsonl", "model.max_seq_len=48"),
)


@pytest.mark.parametrize(
    ("owner", "name", "nth", "step"),
    # a rollout for each of two steps, one to validate, and that of step 3; one batch for each validation
    [(rollout_module, "generate_rollout", 4, 3), (Console, "on_validation_batch_start", 2, 4)],
    ids=["rollout", "validation"],
)
def test_a_policy_that_a_signal_stopped_goes_on_exactly(
    owner: object, name: str, nth: int, step: int, command, send: Send, tmp_path: Path
) -> None:
    (tmp_path / "letters.py").write_text(LETTERS, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "to be or"}\n{"prompt": "not"}\n' * 20, encoding="utf-8")
    arguments = (*RUN, *GRPO, "trainer.accumulate_grad_batches=1")
    assert command("train", *arguments, "hydra.run.dir=whole").status == 0
    send(owner, name, nth=nth)
    stopped = command("train", *arguments, "hydra.run.dir=run")
    assert stopped.status == 143
    assert f"at step {step} of 6" in (tmp_path / "run" / "train.log").read_text()
    assert command("train", "objective.reward=letters:vowels", "resume=run").status == 0
    assert_equal(tmp_path / "run", tmp_path / "whole")


def test_what_is_sent_to_the_processes_that_load_data_does_not_end_the_run(command, monkeypatch) -> None:
    sent = []

    def to_all(*_: object) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            sent.append(worker.pid)

    monkeypatch.setattr(Console, "on_train_batch_start", to_all)
    assert command("train", *RUN, "data.workers=2", "hydra.run.dir=run").status == 0
    assert sent


@pytest.mark.parametrize("seconds", ["0", "-1", "true", ".inf", "null"])
def test_a_grace_period_that_is_none_is_refused(seconds: str, command) -> None:
    result = command("train", *TINY, f"trainer.grace_period={seconds}")
    assert result.status in (1, 2)
    assert result.err.startswith("error: trainer.grace_period=")
    assert result.err.count("\n") == 1


def test_lightning_installs_no_handlers_of_its_own(command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for hook in ("on_train_batch_start", "on_validation_batch_start"):
        monkeypatch.setattr(Console, hook, lambda *_: seen.append(signal.getsignal(signal.SIGTERM).__qualname__))
    assert command("train", *TINY).status == 0
    assert set(seen) == {"SignalWatch._record"}
