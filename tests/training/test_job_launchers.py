"""Sweeps whose jobs are commands of their own: what is submitted, what is skipped, and what a job's end means."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from genai_pl.training import slurm_jobs
from genai_pl.training.job_launcher import Job, JobLauncher
from genai_pl.training.ray_jobs import run_command
from genai_pl.training.slurm_jobs import batch_script
from tests.conftest import TINY
from tests.training.test_sweeps import Pick, _pick  # noqa: F401

GRID = (*TINY, "hydra/launcher=slurm", "optimizer.lr=1e-3,1e-2", "hydra.sweep.dir=sweep")


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Job]:
    """Jobs that would go to Slurm; each of them ends at once, with the learning rate as its loss."""
    jobs: list[Job] = []

    def start(launcher: JobLauncher, given: list[Job], sweep: Path) -> None:
        """End all jobs, those with a sane rate by results."""
        jobs.extend(given)
        for job in given:
            rate = next(word.partition("=")[2] for word in job.command if word.startswith("optimizer.lr="))
            job.folder.mkdir(parents=True)
            if float(rate) < 1 and not (tmp_path / "lost").exists():
                (job.folder / "results.json").write_text(json.dumps({"step": 4, "val/loss": float(rate)}))

    monkeypatch.setattr(slurm_jobs.SlurmLauncher, "start", start)
    return jobs


def test_each_job_is_a_command_that_begins_or_continues_its_run(command, submitted, tmp_path: Path) -> None:
    result = command("train", "-m", *GRID)
    assert result.status == 0, result.err
    assert [job.number for job in submitted] == [0, 1]
    assert [job.folder for job in submitted] == [tmp_path / "sweep" / "0", tmp_path / "sweep" / "1"]
    assert "optimizer.lr=0.001" in submitted[0].command
    assert submitted[1].command[-2:] == [f"hydra.run.dir='{tmp_path}/sweep/1'", "resume=auto"]
    # a second start of the sweep leaves out what is finished
    shutil.rmtree(tmp_path / "sweep" / "1")
    result = command("train", "-m", "resume=sweep")
    assert result.status == 0, result.err
    assert [job.number for job in submitted] == [0, 1, 1]
    # and one that is no resume is refused where there are runs
    (tmp_path / "sweep" / "0" / "checkpoints").mkdir()
    (tmp_path / "sweep" / "0" / "checkpoints" / "last.ckpt").touch()
    result = command("train", "-m", *GRID)
    assert "sweep/0: holds a run already; python train.py -m resume=" in result.err
    assert len(submitted) == 3


def test_jobs_without_results_are_named(command, submitted, tmp_path: Path) -> None:
    (tmp_path / "lost").touch()
    result = command("train", "-m", *GRID)
    assert result.status == 1
    assert result.err.count("\n") == 1
    assert "error: 2 of 2 jobs have not finished:" in result.err
    assert "python train.py -m resume=sweep continues them" in result.err


def test_a_batch_script_runs_the_command_of_its_number(tmp_path: Path) -> None:
    jobs = [Job(3, tmp_path / "3", ["echo", "three words", "it's $HOME"]), Job(5, tmp_path / "5", ["false"])]
    text = batch_script(jobs, tmp_path, {"partition": "gpu", "mem": None, "exclusive": True}, at_once=1)
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=3,5%1" in head
    assert {"#SBATCH --partition=gpu", "#SBATCH --exclusive"} <= set(head)
    assert "mem" not in text
    # bash reads it: srun here only runs what it is given
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tools / "srun").chmod(0o755)

    def run(number: int) -> subprocess.CompletedProcess:
        variables = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_JOB_ID": "9"}
        return subprocess.run(["bash", "-c", text], env=variables, capture_output=True, text=True)

    assert run(3).stdout == "three words it's $HOME\n"
    assert run(5).returncode == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("hydra/launcher=slurm", "+hydra.launcher.options.array=1"),
            "hydra.launcher.options.array: set by the launcher",
        ),
        (("hydra/launcher=slurm", "hydra.launcher.partition=gpu"), "hydra.launcher.partition"),
        (("hydra/launcher=slurm", "model.n_layr=1"), "model.n_layr: no such option"),
    ],
)
def test_a_mistake_is_one_line_and_submits_nothing(options, message: str, command, tmp_path: Path) -> None:
    result = command("train", "-m", *TINY, "seed=1,2", *options)
    assert result.status == 2
    assert result.err.count("\n") == 1
    assert message in result.err
    assert not list(tmp_path.iterdir())


def test_a_cluster_that_is_not_there_is_one_line(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = command("train", "-m", *GRID)
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert "hydra/launcher=slurm: sbatch is not installed here" in result.err


def test_a_command_of_ray_writes_its_log_and_returns_its_status(tmp_path: Path) -> None:
    log = tmp_path / "ray-0.log"
    where = {"log": str(log), "folder": str(tmp_path), "python_path": "here"}
    assert run_command(["bash", "-c", "pwd; echo $PYTHONPATH; exit 3"], **where) == 3
    assert log.read_text().split() == [str(tmp_path), "here"]


@pytest.mark.slow
@pytest.mark.usefixtures("_pick")
def test_a_searching_sweeper_gets_the_results_of_jobs(command, submitted, tmp_path: Path) -> None:
    result = command("train", "-m", *TINY, "hydra/launcher=slurm", "hydra/sweeper=pick", "hydra.sweep.dir=s")
    assert result.status == 0, result.err
    assert Pick.found[:2] == [1e-3, 1e-2]
    assert math.isnan(Pick.found[2])
