"""The benchmark of one GPU, on tiny shapes in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder)}
    command = [sys.executable, str(SCRIPT), "--interpret", "--out", str(folder / "gpu.json"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)


@pytest.mark.parametrize(
    "stages",
    [["attention", "cross_entropy", "decoding"], pytest.param([], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_every_case_runs_and_is_right(stages: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, *stages)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "torch" in report.pop("machine")
    assert list(report) == (stages or ["numbers", "attention", "cross_entropy", "training", "decoding"])
    cases = [figures for stage in report.values() for figures in stage.values()]
    assert all(figures.get("right", figures.get("runs")) is True for figures in cases)


def test_a_stage_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "numbres")
    assert done.returncode == 2
    assert "no stage numbres: choose of numbers, attention" in done.stderr
