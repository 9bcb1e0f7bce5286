"""Runs that lose a process: the others end, and the resumed run equals an uninterrupted one to the last bit."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.strategies.processes import (
    HALF,
    SMALL,
    WHOLE,
    assert_equal_to_the_last_bit,
    processes,
    start,
    table,
    train,
    wait_for_step,
)

RUN = (*SMALL, "trainer.max_steps=20", "model.dropout=0.1", "optimizer=adamw", "callbacks.checkpoint.every_n_steps=2")
PIECES = "strategy.sharded_checkpoints=true"
STRATEGIES = {
    "ddp": ("trainer=ddp", "trainer.devices=2", HALF),
    "fsdp": ("trainer=fsdp", "trainer.devices=2", HALF),
    "accumulate": ("trainer=fsdp", "trainer.devices=2", HALF, "trainer.accumulate_grad_batches=3"),
    "lora": ("trainer=fsdp", "trainer.devices=2", HALF, "peft=lora"),
    "tensor_parallel": ("strategy=tensor_parallel", "trainer.devices=2", WHOLE),
    "sequence": ("strategy=tensor_parallel", "strategy.sequence_parallel=true", "trainer.devices=2", WHOLE),
    "four": ("strategy=tensor_parallel", "strategy.data_parallel_size=2", "trainer.devices=4", HALF),
}
# the strategy, how its checkpoints are written, the process that is killed
SLOW = [
    ("ddp", (), 1),
    ("fsdp", (), 0),
    ("fsdp", (PIECES,), 0),
    ("accumulate", (), 1),
    ("accumulate", (PIECES, "strategy.async_checkpoints=true"), 0),
    ("lora", (PIECES,), 1),
    ("four", (PIECES, "strategy.async_checkpoints=true"), 3),
    ("tensor_parallel", (PIECES,), 1),
    ("tensor_parallel", (), 0),
    ("sequence", (PIECES,), 1),
]
FAST = [("fsdp", (PIECES, "strategy.async_checkpoints=true"), 1)]


@pytest.fixture(scope="module")
def undisturbed(folder: Path):
    """The run of a strategy that nobody kills, trained once."""

    def get(strategy: str) -> Path:
        run = folder / f"{strategy}-undisturbed"
        if not run.exists():
            train(folder, *RUN, *STRATEGIES[strategy], f"hydra.run.dir={run}")
        return run

    return get


@pytest.mark.parametrize(
    ("strategy", "saved", "lost"), [pytest.param(*case, marks=pytest.mark.slow) for case in (*FAST, *SLOW)]
)
def test_a_run_that_lost_a_process_goes_on_exactly(
    strategy: str, saved: tuple[str, ...], lost: int, folder: Path, undisturbed, request: pytest.FixtureRequest
) -> None:
    expected = undisturbed(strategy)
    run = folder / request.node.callspec.id
    process = start(folder, *RUN, *STRATEGIES[strategy], *saved, f"hydra.run.dir='{run}'")
    wait_for_step(process, run, 5)
    os.kill(processes(process)[lost], signal.SIGKILL)
    out, _ = process.communicate(timeout=30)  # the pipe closes when the last of them has gone
    assert process.returncode != 0
    how = "killed by signal 9" if lost else "lost"
    assert f"error: process {lost} of the run was {how}; all end here" in out
    assert "Traceback" not in out
    out = train(folder, "resume=auto", f"hydra.run.dir='{run}'")
    assert "resuming" in out
    exported = "adapter/adapter_model.safetensors" if strategy == "lora" else "model/model.safetensors"
    assert_equal_to_the_last_bit(run, expected, exported)
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["last.ckpt", "step=000018.ckpt", "step=000020.ckpt"]


@pytest.mark.slow
def test_sigterm_to_one_process_saves_for_all(folder: Path, undisturbed) -> None:
    expected, run = undisturbed("fsdp"), folder / "sigterm"
    options = (*STRATEGIES["fsdp"], PIECES, "callbacks.checkpoint.every_n_steps=1000")
    process = start(folder, *RUN, *options, f"hydra.run.dir={run}")
    wait_for_step(process, run, 3)
    os.kill(processes(process)[1], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert [path.name for path in (run / "checkpoints").glob("step=*.ckpt")] == [f"step={max(table(run)):06d}.ckpt"]
    shutil.rmtree(run / "model")
    train(folder, f"resume={run}")
    assert_equal_to_the_last_bit(run, expected, "model/model.safetensors")
