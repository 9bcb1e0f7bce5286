"""Sweeps and trainings through Ray; skipped where Ray is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cluster.runs import OPTIONS, PLAIN, prepare, run, sweep, torchrun, undisturbed_sweep
from tests.cluster.slurm import command_of, kill, parent_of, pids, wait_until
from tests.strategies.processes import MODEL, assert_equal_to_the_last_bit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'ray[default]'"),
]
WORKER = """\
import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

def make(arguments, folder):
    def loop():
        import os
        from genai_pl import train
        os.chdir(folder)
        train(*arguments)
    return loop

ray.init(address="local", num_cpus=4, include_dashboard=False)
trainer = TorchTrainer(
    make(sys.argv[2:], sys.argv[1]),
    scaling_config=ScalingConfig(num_workers=2),
    torch_config=TorchConfig(backend="gloo"),
    run_config=RunConfig(storage_path=sys.argv[1] + "/ray"),
)
trainer.fit()
"""


def is_job(pid: int, run: str) -> bool:
    """Whether a process is the command of a job of a sweep."""
    words = command_of(pid).split()
    return f"hydra.run.dir='{run}'" in words and any(word.endswith("train.py") for word in words)


def test_a_sweep_loses_a_worker_and_no_job(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    with sweep("sweep", folder, PLAIN, "hydra/launcher=ray") as running:
        running.wait_for_checkpoints(3, seconds=600)
        jobs = ((n, pid) for n in running.unfinished() for pid in pids() if is_job(pid, f"{folder}/sweep/{n}"))
        lost, command = next(jobs)
        kill(parent_of(command))  # the worker of Ray, with which its command ends
        wait_until(lambda: not command_of(command), "the command of the lost worker", seconds=10)
        assert lost in running.unfinished()
        running.check(undisturbed_sweep(folder), {lost})


def test_workers_of_ray_train_are_the_processes_of_a_run(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    torchrun(folder, *OPTIONS, "trainer.max_steps=4", "output_dir=torchrun")
    (folder / "worker.py").write_text(WORKER)
    options = (*OPTIONS, "trainer.max_steps=4", f"output_dir={folder}/ray-run")
    run(folder, sys.executable, "worker.py", str(folder), *options)
    assert_equal_to_the_last_bit(folder / "ray-run", folder / "torchrun", MODEL)
