"""`compare.py` says which run of a sweep won, from files that no run of ours has to have written."""

import sys
from pathlib import Path

import pytest
import yaml

from genai_pl.cli.compare import main, read_runs, table, varied_settings

LOSSES = {"0": ("1e-3", [3.0, 2.5, 2.7]), "1": ("3e-3", [2.9, 2.1]), "10": ("1e-2", [4.0, float("nan"), 3.5])}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for name, (lr, losses) in LOSSES.items():
        run = tmp_path / "sweep" / name
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text(f"- optimizer.lr={lr}\n- model.n_layer=2\n")
        rows = [f"{10 * n},{loss}," for n, loss in enumerate(losses, 1)]
        (run / "metrics.csv").write_text("\n".join(["step,val/loss,val/accuracy", "5,,", *rows]) + "\n")
    return tmp_path / "sweep"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_best_run_comes_first_with_what_differs_and_where_it_was_best(sweep: Path) -> None:
    runs = read_runs(sweep, "val/loss")
    assert [run.name for run in runs] == ["0", "1", "10"]
    assert varied_settings(runs) == ["optimizer.lr"]
    lines = [line.split() for line in table(runs, "val/loss", greater=False)]
    assert lines[1:] == [
        ["1", "3e-3", "2.1000", "20", "2.1000"],
        ["0", "1e-3", "2.5000", "20", "2.7000"],
        ["10", "1e-2", "3.5000", "30", "3.5000"],
    ]
    assert [line.split()[0] for line in table(runs, "val/loss", greater=True)[1:]] == ["10", "0", "1"]


def test_benchmarks_are_shown_with_their_intervals_and_a_task_is_known_by_its_first_metric(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    head = "step,val/loss,eval/qa/accuracy,eval/qa/accuracy_low,eval/qa/accuracy_high,eval/qa/chance,eval/books/loss"
    for name, last in (("0", 0.5), ("1", 0.75)):
        rows = ["10,3.0,0.25,0.2,0.3,0.25,", f"20,,{last},0.4,0.8,0.25,2.5", "30,2.0,,,,,"]
        (sweep / name / "metrics.csv").write_text("\n".join([head, *rows]) + "\n")
    assert call(monkeypatch, sweep, "--metric", "eval/qa", "--report", sweep / "compare.html", "--no-picture") == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["run", "optimizer.lr", "best eval/qa/accuracy", "at step", "last"]
    assert cells[1] == ["1", "3e-3", "0.7500 (0.400 to 0.800)", "20", "0.7500"]
    assert cells[5:9] == [
        ["last", "eval/qa/accuracy", "eval/books/loss"],
        ["0", "0.5000 (0.400 to 0.800)", "2.5000"],
        ["1", "0.7500 (0.400 to 0.800)", "2.5000"],
        ["10"],
    ]
    assert "Benchmarks at the end" in (text := (sweep / "compare.html").read_text())
    assert "0.7500 (0.400 to 0.800)" in text


def test_a_picture_is_drawn(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert call(monkeypatch, sweep) == 0
    assert (sweep / "compare.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert f"picture: {sweep / 'compare.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sweep/0/.hydra",), "sweep/0/.hydra: no metrics.csv below it"),
        (("nowhere",), "nowhere: no such folder, nor a sweep or run of this name"),
        (("mein",), "no such folder, nor a sweep or run of this name (the nearest here: multirun/2026-01-01/mine)"),
        (("sweep", "--metric", "val/los"), "no run has logged val/los; there are: val/accuracy, val/loss"),
        (("sweep", "--metric", "val/accuracy"), "no run has logged val/accuracy"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], message: str, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(sweep.parent)
    (sweep.parent / "multirun" / "2026-01-01" / "mine").mkdir(parents=True)
    (sweep.parent / "multirun" / "2026-01-01" / "mine" / "multirun.yaml").touch()
    assert call(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_sweep_is_compared_by_its_name(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(sweep.parent)
    (sweep / "multirun.yaml").touch()
    Path("multirun").mkdir()
    sweep.rename("multirun/mine")
    assert call(monkeypatch, "mine", "--no-picture") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "1", "0", "10"]


def test_a_table_says_which_runs_are_not_in_it_and_that_losses_of_several_objectives_do_not_compare(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (sweep / "other").mkdir()
    (sweep / "other" / "metrics.csv").write_text("step,train/loss,val/loss\n1,2.0,\n")
    for run, objective in (("0", "clm"), ("1", "dpo"), ("10", "clm")):
        chosen = {"hydra": {"runtime": {"choices": {"objective": objective}}}}
        (sweep / run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(chosen))
    assert call(monkeypatch, sweep, "--no-picture") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["1", "0", "10"]
    assert lines[4:] == [
        "note: 1 run has no val/loss: other",
        "note: val/loss of different objectives does not compare: clm, dpo",
    ]


def test_without_matplotlib_the_table_is_all_and_a_picture_that_was_asked_for_is_an_error(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("genai_pl.cli.compare.find_spec", lambda name: None)
    assert call(monkeypatch, sweep) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[-1], err) == (
        "picture: none, it is drawn with matplotlib: pip install -e '.[plots]'",
        "",
    )
    assert call(monkeypatch, sweep, "--out", "own.png") == 1
    assert "compare.py draws with matplotlib: pip install -e '.[plots]'" in capsys.readouterr().err
