"""Trainings and sweeps through a real Slurm of two nodes; skipped where Slurm is not installed."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.preemptions import length, preempted, restarts
from tests.cluster.runs import (
    OPTIONS,
    SCRIPT,
    TRAIN,
    environment,
    here,
    prepare,
    sweep,
    torchrun,
    undisturbed_sweep,
)
from tests.cluster.slurm import Cluster, missing, running, wait_until
from tests.strategies.processes import MODEL, assert_equal_to_the_last_bit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"{missing()} is not installed: apt install slurm-wlm munge"),
]
LONGER = 240  # steps of half a second
SLOW = """\
import time

from lightning.pytorch.callbacks import Callback


class Slow(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        time.sleep(0 if module.window else 0.5)
"""
LOSSES = ("train/loss", "train/grad_norm", "val/loss")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm") / "cluster") as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("runs"))


def test_two_nodes_train_as_two_processes_of_torchrun(cluster: Cluster, folder: Path) -> None:
    steps = "trainer.max_steps=4"
    torchrun(folder, *OPTIONS, steps, "output_dir=torchrun")
    numbers = ("trainer.num_nodes=2", "trainer.devices=1")
    srun = ("srun", "--nodes=2", "--ntasks=2", *TRAIN, *OPTIONS, steps, *numbers)
    out = cluster.run(*srun, "output_dir=srun", cwd=folder, env=environment(cluster))
    assert "(2 rows x 32 x 4 batches x 2 devices)" in out
    assert_equal_to_the_last_bit(folder / "srun", folder / "torchrun", MODEL, LOSSES)
    # the folder is written by one task, and the log is what a terminal has shown
    assert sorted(path.name for path in (folder / "srun").iterdir()) == sorted(
        path.name for path in (folder / "torchrun").iterdir()
    )
    log = (folder / "srun" / "train.log").read_text()
    assert log.count("    step      loss") == out.count("    step      loss") == 1
    assert all(line in out for line in log.splitlines())
    # without a name both tasks take that of the job
    cluster.run(*srun[:3], *TRAIN, *OPTIONS, "trainer.max_steps=1", cwd=folder, env=environment(cluster))
    assert [path.name[:6] for path in (folder / "outputs").glob("*/*")] == ["slurm-"]
    # numbers that do not fit, in one line of each task
    wrong = cluster.run(*srun, "trainer.devices=2", cwd=folder, env=environment(cluster), check=False)
    assert "error: trainer.devices=2: srun has started 1 a node; srun --ntasks-per-node=2" in wrong
    assert "Traceback" not in wrong


def test_a_preempted_run_is_the_undisturbed_one(cluster: Cluster, folder: Path) -> None:
    times = 3  # one of each kind; python tests/cluster/preemptions.py 20 makes more
    torchrun(folder, *OPTIONS, f"trainer.max_steps={length(times)}", "output_dir=undisturbed")
    run, at = preempted(cluster, folder, times=times, steps=length(times))
    assert len(at) == times
    assert max(at) < length(times)
    assert (run / "train.log").read_text().count("resuming ") >= 1
    assert_equal_to_the_last_bit(run, folder / "undisturbed", MODEL, LOSSES)


def test_a_run_longer_than_the_time_limit_is_the_undisturbed_one(cluster: Cluster, folder: Path) -> None:
    steps = f"trainer.max_steps={LONGER}"
    torchrun(folder, *OPTIONS, steps, "output_dir=unlimited")
    run = folder / "limited"
    script = here(SCRIPT, folder, time="2", signal="USR1@30")  # sent 30 to 90 s after the start
    (folder / "slow.py").write_text(SLOW, encoding="utf-8")
    variables = {**environment(cluster), "RUN": str(run)}
    variables["PYTHONPATH"] = f"{folder}{os.pathsep}{variables['PYTHONPATH']}"
    job = cluster.submit(str(script), *OPTIONS, steps, "+callbacks.slow._target_=slow.Slow", cwd=folder, env=variables)
    state = cluster.wait(job, seconds=900)
    log = (folder / f"slurm-{job}.log").read_text(encoding="utf-8")
    assert state == "COMPLETED", log
    assert "DUE TO TIME LIMIT" not in log
    assert "Traceback" not in log
    again = restarts(cluster, job)
    assert again >= 1
    assert log.count("stopped     by SIGUSR1") == again
    assert (run / "train.log").read_text().count("resuming ") == again
    assert_equal_to_the_last_bit(run, folder / "unlimited", MODEL, LOSSES)


def test_a_sweep_loses_a_node_and_no_job(cluster: Cluster, folder: Path) -> None:
    launcher = ("hydra/launcher=slurm", "hydra.launcher.options.time=10")
    with sweep("sweep", folder, environment(cluster), *launcher) as running:
        running.wait_for_checkpoints(3, seconds=600)
        there = cluster.run("squeue", "--noheader", "--nodelist=node2", "--states=RUNNING", "--format=%K").split()
        lost = {n for n in running.unfinished() if str(n) in there}
        cluster.kill_node("node2")
        wait_until(lambda: "down" in cluster.run("sinfo", "-hn", "node2", "-o", "%t"), "node2", seconds=60)
        assert lost
        assert lost <= set(running.unfinished())
        cluster.start_node("node2")
        running.check(undisturbed_sweep(folder), lost)
