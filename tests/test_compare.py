"""`compare.py` says which run of a sweep won, from files that no run of ours has to have written."""

import sys
from pathlib import Path

import pytest

from genai_pl.compare import main, read_runs, table, varied

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
    assert varied(runs) == ["optimizer.lr"]
    lines = [line.split() for line in table(runs, "val/loss", greater=False)]
    assert lines[1:] == [
        ["1", "3e-3", "2.1000", "20", "2.1000"],
        ["0", "1e-3", "2.5000", "20", "2.7000"],
        ["10", "1e-2", "3.5000", "30", "3.5000"],
    ]
    assert [line.split()[0] for line in table(runs, "val/loss", greater=True)[1:]] == ["10", "0", "1"]


def test_a_picture_is_drawn(sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert call(monkeypatch, sweep) == 0
    assert (sweep / "compare.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert f"picture: {sweep / 'compare.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere: no metrics.csv below it"),
        (("sweep", "--metric", "val/los"), "no run has logged val/los; there are: val/accuracy, val/loss"),
        (("sweep", "--metric", "val/accuracy"), "no run has logged val/accuracy"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], message: str, sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(sweep.parent)
    assert call(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
