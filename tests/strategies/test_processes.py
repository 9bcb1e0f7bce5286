"""The processes of a run: resumed in other numbers, started by torchrun or by a sweep."""

import shutil
from pathlib import Path

import pytest
import torch

from genai_pl.loading import load
from tests.strategies.processes import HALF, SMALL, WHOLE, assert_same, start, table, train, write_documents

TWO = ("trainer=fsdp", "trainer.devices=2", HALF)
PIECES = "strategy.sharded_checkpoints=true"
ONE = ("trainer=default", "strategy=auto", "trainer.devices=1", WHOLE)


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """Where the run of one process is already."""
    train(folder, *SMALL, WHOLE, "hydra.run.dir=one")
    return folder


@pytest.fixture(scope="module")
def stopped(folder: Path):
    """A run of two processes that stopped half-way, with its checkpoint in one file or in shards."""

    def get(*options: str) -> Path:
        run = folder / f"stopped{len(options)}"
        if not run.exists():
            train(folder, *SMALL, *TWO, *options, "trainer.max_steps=2", f"hydra.run.dir={run.name}")
        return run

    return get


@pytest.mark.parametrize(
    ("saved", "after"),
    [
        ((), ONE),
        pytest.param((PIECES,), ONE, marks=pytest.mark.slow),
        pytest.param((PIECES,), (), marks=pytest.mark.slow),
    ],
    ids=["file-one", "shards-one", "shards-two"],
)
def test_a_run_of_two_processes_goes_on_with_any_number(
    saved: tuple[str, ...], after: tuple[str, ...], stopped, request: pytest.FixtureRequest
) -> None:
    run = stopped(*saved).with_name(request.node.callspec.id + "-more")
    shutil.copytree(stopped(*saved), run, symlinks=True)
    out = train(run.parent, f"resume={run.name}", *after, "trainer.max_steps=4")
    assert f"resuming    {run.name}/checkpoints" in out
    # the run that stopped half-way has a validation more
    assert_same(run, run.with_name("one"), names=("train/loss", "train/grad_norm"))


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_two(folder: Path) -> None:
    train(folder, *SMALL, *ONE, "trainer.max_steps=2", "hydra.run.dir=grown")
    train(folder, "resume=grown", *TWO, "strategy=fsdp", PIECES, "trainer.max_steps=4")
    run = folder / "grown"
    assert_same(run, folder / "one", names=("train/loss", "train/grad_norm"))
    # the sharded checkpoint is read wherever a model is
    for path in (run / "checkpoints" / "last.ckpt", run / "checkpoints" / "step=000004.ckpt"):
        model, right = load(str(path)).model, load(str(run / "model")).model
        assert all(map(torch.equal, model.parameters(), right.parameters()))


@pytest.mark.slow
def test_torchrun_starts_the_processes(folder: Path) -> None:
    options = ("trainer=fsdp", HALF, "hydra.run.dir=torchrun")
    train(folder, *SMALL, *options, launch=("-m", "torch.distributed.run", "--nproc-per-node=2"))
    assert_same(folder / "torchrun", folder / "one")


@pytest.mark.slow
def test_a_sweep_of_two_processes_leaves_a_folder_per_job(folder: Path) -> None:
    options = ("trainer=ddp", "trainer.devices=2", HALF, "trainer.max_steps=2", "callbacks.export=false")
    train(folder, "-m", *SMALL, *options, "model.n_layer=1,2", "hydra.sweep.dir=sweep")
    assert sorted(path.name for path in (folder / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
    assert not (folder / "outputs").exists()
    assert not (folder / "multirun").exists()
    first, second = (table(folder / "sweep" / name) for name in "01")
    assert first[1]["train/loss"] != second[1]["train/loss"]
    # the second job is the run of one process
    assert float(second[1]["train/loss"]) == pytest.approx(float(table(folder / "one")[1]["train/loss"]), rel=1e-5)


MISTAKES = {
    "strategy=tensor_parallel trainer.devices=2 model.n_head=1": "model.n_head (1) must be divisible by",
    "strategy=tensor_parallel trainer.devices=2 strategy.tensor_parallel_size=3": "must be the number of processes",
    "strategy=tensor_parallel trainer.devices=2 model.attention_kind=performer": "attention_kind=performer",
    "trainer=fsdp trainer.devices=2 strategy.sequence_parallel=true": "needs strategy.tensor_parallel_size above 1",
    "trainer=fsdp precision=fp16": "does not support",
    "trainer=fsdp trainer.devices=4 strategy.replicate_size=3": "replicate_size (3) must divide",
    "trainer=fsdp strategy.async_checkpoints=true": "needs strategy.sharded_checkpoints=true",
    "trainer.recompute_every=0": "trainer.recompute_every=0",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, command, tmp_path: Path) -> None:
    write_documents(tmp_path)
    result = command("train", *SMALL, *mistake.split())
    assert result.status in (1, 2)
    assert result.err.count("\n") == 1
    assert MISTAKES[mistake] in result.err


@pytest.mark.slow
def test_a_mistake_that_one_process_alone_meets_is_told_without_a_traceback(folder: Path) -> None:
    (folder / "one.txt").write_text("one line of text, which one of the processes has and the other has not\n")
    stream = ("data.streaming=true", "data.path=one.txt", "data.val_path=one.txt", "trainer.limit_val_batches=0")
    run = start(folder, *SMALL, "trainer=ddp", "trainer.devices=2", HALF, *stream, "output_dir=alone")
    out, _ = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "the stream has 1 passages, too few for 2 workers" in out
    assert "Traceback" not in out
