"""The benchmark of one GPU: its cases on tiny shapes without one, and stages that die, hang or come too late."""

import importlib
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
STAGES = ["probe", "numbers", "decoding", "training", "attention", "cross_entropy"]


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    """The command as a module; no stage of it is imported."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(
        sys.modules, "kernels", raising=False
    )  # transformers looks for a package of that name, and finds tests/
    return importlib.import_module("gpu")


@pytest.mark.parametrize("stages", [["decoding"], pytest.param([], marks=pytest.mark.slow)], ids=["one", "all"])
def test_every_case_runs_and_is_right(stages: list[str], tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, str(FOLDER / "gpu.py"), "--interpret", "--out", "gpu.json", *stages]
    command += [] if stages else ["--minutes", "30"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=2000)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "torch" in report.pop("machine")
    assert list(report) == (stages or STAGES)
    cases = [figures for stage in report.values() for figures in stage.values()]
    assert all(figures.get("right", figures.get("runs")) is True for figures in cases)


@pytest.mark.parametrize(
    "stage", ["numbers", "training", "attention", "cross_entropy"]
)  # the probe has a file of its own
def test_the_first_case_of_every_stage_runs_and_is_right(stage: str, gpu, command, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("triton", reason="the kernels need triton")
    stages = importlib.import_module("gpu_stages")

    def in_this_process(line: list[str], **_: object) -> SimpleNamespace:
        result = command("train", *line[2:])
        return SimpleNamespace(returncode=result.status, stdout=result.out, stderr=result.err)

    monkeypatch.setattr(stages, "subprocess", SimpleNamespace(run=in_this_process))
    every = stages.STAGES[stage]
    monkeypatch.setattr(stages, "STAGES", {stage: lambda given: islice(every(given), 1)})
    assert gpu.run_here(options(tmp_path, [stage]), stage) == 0
    (figures,) = json.loads((tmp_path / "gpu.json").read_text())[stage].values()
    assert figures.get("right", figures.get("runs")) is True


def options(folder: Path, stages: list[str], minutes: float = 8.0) -> SimpleNamespace:
    end = __import__("time").monotonic() + 60 * minutes
    return SimpleNamespace(stages=stages, out=folder / "gpu.json", end=end, interpret=True, minutes=minutes)


CHILD = """
import json, os, signal, sys, time
stage, out = sys.argv[1], sys.argv[3]
if stage == "training":
    raise SystemExit("no torch here")
if stage == "attention":
    time.sleep(600)
json.dump({"machine": {"device": "a GPU"}, stage: {"first": {"right": True}}}, open(out, "w"))
if stage == "numbers":
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize(
    ("stage", "status", "entry"),
    [
        ("probe", 0, {"first": {"right": True}}),
        ("numbers", -11, {"first": {"right": True}, "stage": {"failed": "it was killed by SIGSEGV"}}),
        ("training", 1, {"stage": {"failed": "it did not begin"}}),
        ("attention", 1, {"stage": {"failed": "it was killed after 0 s, as a case did not end"}}),
    ],
)
def test_a_stage_that_dies_or_hangs_keeps_its_cases_and_says_how(
    gpu: ModuleType, stage: str, status: int, entry: dict, tmp_path: Path, monkeypatch
) -> None:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(gpu, "SCRIPT", script)
    hangs = stage == "attention"
    monkeypatch.setattr(gpu, "GRACE", 0.3 if hangs else 60.0)
    part, found = gpu.run_child(options(tmp_path, [stage]), stage, 0.1 if hangs else 60.0)
    assert found == status
    assert part[stage] == entry


def test_what_a_stage_leaves_goes_to_the_next_and_the_file_is_written_after_each(
    gpu: ModuleType, tmp_path, monkeypatch
):
    given: dict[str, float] = {}
    written: list[list[str]] = []

    def child(_: object, stage: str, seconds: float) -> tuple[dict, int]:
        given[stage] = seconds
        if (tmp_path / "gpu.json").exists():
            written.append(list(json.loads((tmp_path / "gpu.json").read_text())))
        return {"machine": {"device": "a GPU"}, stage: {"first": {"ms": 1.25}}}, int(stage == "numbers")

    monkeypatch.setattr(gpu, "run_child", child)
    assert gpu.run_apart(options(tmp_path, STAGES)) == 1
    assert written[1] == ["machine", "probe", "numbers"]
    assert given["cross_entropy"] == pytest.approx(480, rel=0.1)  # the others took no time
    assert given["numbers"] == pytest.approx(480 * 0.25 / 0.95, rel=0.1)
    page = (tmp_path / "gpu.md").read_text()
    assert "Measured on device a GPU." in page
    assert "| case | ms |\n|---|---|\n| first | 1.25 |" in page


def test_stages_that_come_too_late_are_left_out(gpu: ModuleType, tmp_path: Path) -> None:
    assert gpu.run_apart(options(tmp_path, ["probe", "training"], minutes=0.01)) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report == {stage: {"stage": {"left out": "the time was up"}} for stage in ("probe", "training")}


def test_cases_that_come_too_late_are_left_out_and_one_that_fails_does_not_end_a_stage(gpu, tmp_path, monkeypatch):
    def breaks() -> dict:
        raise RuntimeError("CUDA error: misaligned address\nmore")

    cases = [("bad", breaks), ("wrong", lambda: {"right": False}), ("good", lambda: {"right": True, "error": 0.5})]
    monkeypatch.setitem(sys.modules, "gpu_stages", SimpleNamespace(STAGES={"numbers": lambda _: iter(cases)}))
    assert gpu.run_here(options(tmp_path, ["numbers"]), "numbers") == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["numbers"]["bad"] == {"failed": "RuntimeError: CUDA error: misaligned address"}
    assert report["numbers"]["good"] == {"right": True, "error": 0.5}
    assert gpu.run_here(options(tmp_path, ["numbers"], minutes=0.0), "numbers") == 0
    assert set(json.loads((tmp_path / "gpu.json").read_text())["numbers"]["bad"]) == {"left out"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["numbres"], "no stage numbres: choose of probe"), (["--minutes", "0"], "give more than 0")],
)
def test_mistakes_are_named(gpu: ModuleType, arguments: list[str], said: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
