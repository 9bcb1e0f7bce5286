"""Signals to one process of a run or to all: all stop at one place, or end together when one does not answer."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.strategies.processes import HALF, SMALL, WHOLE, assert_equal_to_the_last_bit, start, train

SENDER = """
import os, signal
from pathlib import Path
import lightning as L

class Send(L.Callback):
    '''Sends what SEND says: hook, number of its call, rank that sends, signal, ranks it goes to.'''

    def __init__(self):
        self.calls = 0
        if "SEND" in os.environ:
            self.hook, nth, rank, name, to = os.environ["SEND"].split()
            self.nth, self.rank, self.signum = int(nth), int(rank), getattr(signal, name)
            self.to = [int(rank) for rank in to.split(",")]
            setattr(self, self.hook, self.send)

    def send(self, trainer, *_, **__):
        self.calls += 1
        if self.calls == self.nth and trainer.global_rank == self.rank:
            first = os.getppid() if trainer.global_rank else os.getpid()
            others = Path(f"/proc/{first}/task/{first}/children").read_text().split()
            pids = [first, *map(int, others)]
            for rank in self.to:  # the own process last: it may be stopped by it
                os.kill(pids[rank], self.signum)
"""
CALLBACK = "+callbacks.extra.send._target_=sender.Send"
RUN = (
    *(CALLBACK, *SMALL, "trainer.max_steps=6", "trainer.val_check_interval=2", "trainer.limit_val_batches=3"),
    *("model.dropout=0.1", "optimizer=adamw", "callbacks.checkpoint.every_n_steps=1000"),
)
STRATEGIES = {
    "ddp": ("trainer=ddp", "trainer.devices=2", HALF),
    "fsdp": ("trainer=fsdp", "trainer.devices=2", HALF),
    "tensor_parallel": ("strategy=tensor_parallel", "trainer.devices=2", WHOLE),
    "pipeline": ("strategy=pipeline", "strategy.microbatches=2", "trainer.devices=2", WHOLE),
    "four": ("strategy=tensor_parallel", "strategy.data_parallel_size=2", "trainer.devices=4", HALF),
}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def send(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`send("hook nth rank signal ranks", run, *options)`: the status and output of a run that sends itself a signal."""
    (folder / "sender.py").write_text(SENDER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def run(what: str, name: str, *options: str) -> tuple[int, str]:
        with monkeypatch.context() as patch:
            patch.setenv("SEND", what)
            process = start(folder, *RUN, *options, f"hydra.run.dir={name}")
        out, _ = process.communicate(timeout=120)
        return process.returncode, out

    return run


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[[str], Path]:
    """The run of a strategy that no signal comes to, trained once."""

    def get(strategy: str) -> Path:
        run = folder / f"{strategy}-undisturbed"
        if not run.exists():
            train(folder, *RUN[1:], *STRATEGIES[strategy], f"hydra.run.dir={run}")
        return run

    return get


def assert_stopped(status: int, out: str, *, step: int, name: str) -> None:
    expected = 130 if name == "SIGINT" else 143
    assert status == expected, out
    assert f"stopped     by {name} at step {step} of 6, saved in " in out
    assert "Traceback" not in out
    assert "error:" not in out


CASES = [
    ("ddp", "on_validation_batch_end 8 1 SIGTERM 1,0", 6, "SIGTERM"),  # the validation of the last step, to all
    ("fsdp", "on_validation_batch_end 8 0 SIGTERM 0,1", 6, "SIGTERM"),
    ("fsdp", "on_validation_batch_start 2 1 SIGTERM 1", 2, "SIGTERM"),
    ("fsdp", "on_train_batch_start 3 0 SIGINT 0,1", 3, "SIGINT"),
    ("tensor_parallel", "on_validation_batch_start 5 1 SIGTERM 1", 4, "SIGTERM"),
    ("pipeline", "on_validation_batch_start 5 1 SIGUSR1 0,1", 4, "SIGUSR1"),
    ("pipeline", "on_train_batch_start 3 0 SIGTERM 0", 3, "SIGTERM"),
    ("four", "on_train_batch_start 4 3 SIGTERM 3", 4, "SIGTERM"),
]


@pytest.mark.parametrize(
    ("strategy", "what", "step", "name"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_all_processes_stop_at_one_place_and_the_run_goes_on_exactly(
    strategy: str, what: str, step: int, name: str, folder: Path, send: Run, undisturbed, request: pytest.FixtureRequest
) -> None:
    run = f"stopped-{request.node.callspec.indices['strategy']}"
    status, out = send(what, run, *STRATEGIES[strategy])
    assert_stopped(status, out, step=step, name=name)
    assert [path.name for path in (folder / run / "checkpoints").glob("step=*")] == [f"step={step:06d}.ckpt"]
    train(folder, f"resume={run}", CALLBACK)
    assert_equal_to_the_last_bit(folder / run, undisturbed(strategy))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="says of a process that it is stopped")
@pytest.mark.parametrize("stopped", [0, 1])
def test_the_others_end_when_a_process_is_stopped_for_longer_than_the_grace_period(
    stopped: int, folder: Path, send: Run
) -> None:
    options = (*STRATEGIES["ddp"], "trainer.grace_period=3")
    name, line = f"still-{stopped}", f"error: process {stopped} of the run was stopped for 3 s (trainer.grace_period)"
    if stopped:
        status, out = send(f"on_train_batch_start 3 1 SIGSTOP {stopped}", name, *options)
        assert (status, out.count("error:")) == (1, 1)
        assert line in out
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEND", "on_train_batch_start 3 0 SIGSTOP 0")
        process = start(folder, *RUN, *options, f"hydra.run.dir={name}")
    said = next(text for text in process.stdout if text.startswith("error:"))
    assert line in said
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in out


@pytest.mark.slow
def test_a_signal_ends_a_process_that_waits_for_one_which_does_not_answer(folder: Path, send: Run) -> None:
    options = (*STRATEGIES["ddp"], "trainer.grace_period=4", "callbacks.checkpoint.every_n_steps=2")
    # rank 1 stops itself, and has sent the first process SIGTERM before
    both = SENDER.replace(
        "os.kill(pids[rank], self.signum)", "os.kill(pids[rank], (signal.SIGTERM, signal.SIGSTOP)[rank])"
    )
    (folder / "sender.py").write_text(both, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("SEND", "on_train_batch_start 3 1 SIGTERM 0,1")
        process = start(folder, *RUN, *options, "hydra.run.dir=silent")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out
    assert out.splitlines()[-1].startswith(
        "stopped     by SIGTERM: saved in silent/checkpoints/last.ckpt; python train.py"
    )
    assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize("to", ["0", "1", "0,1"])
def test_before_training_a_signal_to_any_process_ends_all(to: str, send: Run) -> None:
    status, out = send(f"on_fit_start 1 {to[0]} SIGTERM {to}", f"early-{to[0]}{len(to)}", *STRATEGIES["ddp"])
    assert status == 143, out
    assert out.count("stopped     by SIGTERM") == 1
    assert "nothing was saved" in out
    assert "Traceback" not in out
    assert "error:" not in out
