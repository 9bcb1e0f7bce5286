"""A small training that Slurm runs, and its comparison with one that nobody disturbs."""

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.cluster.slurm import Cluster, wait_until
from tests.conftest import ROOT
from tests.strategies.processes import assert_equal_to_the_last_bit, write_documents

OPTIONS = (
    *("model.n_layer=2", "model.n_embd=32", "model.max_seq_len=32", "model.dropout=0.1", "tokenizer=byte"),
    *("data.path=documents.jsonl", "data.batch_size=2", "optimizer=adamw", "scheduler=constant", "strategy=ddp"),
    *("trainer.accelerator=cpu", "trainer.limit_val_batches=2", "trainer.log_every_n_steps=1", "logger=csv"),
    *(
        "callbacks.samples.every_n_steps=null",
        "trainer.accumulate_grad_batches=4",
    ),
)
TRAIN = (sys.executable, str(ROOT / "train.py"))
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # Ray may be in the second
SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"


def environment(cluster: Cluster) -> dict[str, str]:
    """Variables of a training in the cluster."""
    python = {"PYTHON": TRAIN[0], "TRAIN": TRAIN[1], "PYTHONPATH": PYTHONPATH}
    return {**cluster.environment, **python, "HF_HUB_OFFLINE": "1"}


def prepare(folder: Path) -> Path:
    """The working folder of trainings, with their text."""
    folder.mkdir(exist_ok=True)
    write_documents(folder)
    return folder


def here(script: Path, folder: Path, *, time: str = "10", signal: str = "USR1@120") -> Path:
    """A shipped batch script for the nodes of the test: one task, no GPU, other limits. time: minutes."""
    text = script.read_text(encoding="utf-8")
    text = re.sub(r"^#SBATCH --gpus.*\n", "", text, flags=re.M)
    text = re.sub(r"(--ntasks-per-node|--cpus-per-task)=\d+", r"\1=1", text)
    text = re.sub(r"--time=\S+", f"--time={time}", text)
    text = re.sub(r"--signal=\S+", f"--signal={signal}", text)
    copied = folder / script.name
    copied.write_text(text, encoding="utf-8")
    return copied


PLAIN = {  # variables of a training outside of Slurm; Ray waits until it has started on a busy machine
    **os.environ,
    "PYTHONPATH": PYTHONPATH,
    "OMP_NUM_THREADS": "1",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run(folder: Path, *command: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(command, cwd=folder, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def torchrun(folder: Path, *arguments: str) -> str:
    """What two processes of torchrun print."""
    return run(folder, TRAIN[0], "-m", "torch.distributed.run", "--nproc-per-node=2", TRAIN[1], *arguments)


class Sweep(NamedTuple):
    """A sweep of eight jobs: its folder, and the process that launches it."""

    path: Path
    process: subprocess.Popen

    def saved(self) -> list[int]:
        """Numbers of the jobs that have a checkpoint."""
        return [n for n in range(8) if any((self.path / str(n) / "checkpoints").glob("step=*.ckpt"))]

    def wait_for_checkpoints(self, count: int, seconds: float) -> None:
        """Return when so many jobs have one; AssertionError with its output when the launcher ends before."""

        def saved_or_ended() -> bool:
            return len(self.saved()) >= count or self.process.poll() is not None

        wait_until(saved_or_ended, "jobs of the sweep", seconds=seconds)
        assert self.process.poll() is None, self.process.communicate()[0]

    def unfinished(self) -> list[int]:
        """Numbers of the jobs that have a checkpoint and no results."""
        return [n for n in self.saved() if not (self.path / str(n) / "results.json").exists()]

    def check(self, expected: Path, lost: Collection[int]) -> None:
        """All jobs have ended, those that were lost continued, and each has the numbers of an undisturbed one."""
        out, _ = self.process.communicate(timeout=1800)
        assert self.process.returncode == 0, out
        for n in lost:
            assert "resuming " in (self.path / str(n) / "train.log").read_text(encoding="utf-8"), n
        for n in range(8):
            assert_equal_to_the_last_bit(self.path / str(n), expected / str(n))


@contextmanager
def sweep(name: str, folder: Path, environment: dict[str, str], *launcher: str) -> Iterator[Sweep]:
    """A sweep of eight jobs, which is going on; its launcher ends with the context."""
    grid = ("optimizer.lr=1e-3,3e-3", "seed=1,2,3,4", "trainer.max_steps=60", "callbacks.checkpoint.every_n_steps=5")
    command = [*TRAIN, "-m", *OPTIONS, "strategy=auto", *grid, *launcher, f"hydra.sweep.dir={name}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **streams) as process:
        try:
            yield Sweep(folder / name, process)
        finally:
            if process.poll() is None:  # a test has failed
                process.terminate()


def undisturbed_sweep(folder: Path) -> Path:
    """The folder of the same sweep, one job after the other."""
    if not (folder / "undisturbed-sweep").exists():
        with sweep("undisturbed-sweep", folder, PLAIN) as done:
            out, _ = done.process.communicate(timeout=1800)
        assert done.process.returncode == 0, out
    return folder / "undisturbed-sweep"
