"""report.html holds what its run wrote, reads as valid HTML without anything from elsewhere, and never fails a run."""

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from genai_pl.reporting.chart import Series, line_chart, thin
from genai_pl.reporting.run_page import evaluation
from genai_pl.training import run_report
from genai_pl.training.run_report import collect_facts, write_run_report
from tests.conftest import TINY

VOID = {"meta", "br"}


class Page(HTMLParser):
    """The texts of a page; an unclosed or misplaced tag raises."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert not any(value and re.match("(https?:)?//", value) for _, value in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        assert tag in ("line", "polyline", "polygon", "rect")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


OPTIONS = (
    *TINY,
    *("callbacks.samples.every_n_steps=2", "callbacks.samples.max_new_tokens=4", "plan.gpu=x"),
    *("callbacks.samples.prompts=['a<b>']", "trainer.val_check_interval=2", "callbacks.checkpoint.best=val/loss"),
)


def test_the_report_of_a_run_in_two_parts_has_its_settings_curves_samples_and_warnings(command, tmp_path: Path) -> None:
    assert command("train", *OPTIONS, "trainer.max_steps=2", "hydra.run.dir=run").status == 0
    result = command("train", "resume=run", "trainer.max_steps=4")
    assert result.status == 0, result.err
    assert "report      run/report.html" in result.out
    text = (tmp_path / "run" / "report.html").read_text()
    page = Page(text)
    assert "http" not in text.replace("http-equiv", "")
    for words in ("unused: plan.gpu=x: has no effect: it is for dry_run=true", "changed: trainer.max_steps=4 (was 2)"):
        assert words in page.texts
    # the data, the command, and a curve over both parts
    assert any(text.startswith("shakespeare, ") for text in page.texts)
    assert any(text.startswith("python train.py model.n_layer=1") for text in page.texts)
    assert "val/loss 5.5" in text or 'class="dot c1"' in text
    labels = re.findall(r"training (\S+) at (\d+)</title>", text)
    assert [int(step) for _, step in labels[:4]] == [1, 2, 3, 4]
    # samples of both parts, each once
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert "a&lt;b&gt;" in text
    assert "step 2" in page.texts


def test_a_failing_report_is_one_line_and_the_run_ends_well(command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect\nof two lines")

    monkeypatch.setattr(run_report, "collect_facts", fail)
    result = command("train", *TINY, "hydra.run.dir=run")
    assert result.status == 0
    assert "report      none, it failed: RuntimeError: a defect\n" in result.out
    assert Path("run/results.json").exists()
    assert not Path("run/report.html").exists()


def test_a_run_that_fails_has_a_report_with_its_error(command) -> None:
    result = command("train", *TINY, "optimizer=sgd", "optimizer.lr=1e30", "hydra.run.dir=run")
    assert result.status == 1
    error = result.err.splitlines()[-1]
    assert "is not finite at step" in error
    assert f"report      {Path('run/report.html')}\n" in result.out
    assert error in Path("run/report.html").read_text()


def test_a_folder_with_nothing_but_a_table_gives_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/loss,val/height\n1,2.5,nan\n2,2.0,\n3,inf,\n")
    path = write_run_report(tmp_path, results={"val/loss": 2.0}, best=None, device=torch.device("cpu"))
    Page(path.read_text())


def test_an_interval_is_a_column_and_no_metric_of_its_own() -> None:
    results = {"eval/x": 0.5, "eval/x_low": 0.25, "eval/x_high": 0.75, "val/y": 1.0, "best/val/y": 2.0, "z_low": 3.0}
    assert evaluation(results) == [
        ("eval/x", "0.5", "0.25 to 0.75", ""),
        ("val/y", "1", "", "2"),
        ("z_low", "3", "", ""),
    ]


def test_a_long_series_is_drawn_by_means_of_neighbours_and_points_lie_where_their_values_are() -> None:
    import numpy as np

    values = np.random.default_rng(0).normal(size=1200)
    means = thin(Series("x", list(range(1200)), values.tolist())).values
    np.testing.assert_allclose(means, values.reshape(300, 4).mean(1))
    svg = line_chart([Series("x", [0, 50, 100], [1.0, 3.0, 2.0])])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'polyline[^>]*points="([^"]+)"', svg)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y2) * 2 == pytest.approx(y0 - y1, abs=0.21)  # upwards is less in SVG


def test_the_words_that_a_folder_is_not_trusted_for_stand_beside_resume(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    words = ["trainer.max_steps=4", "callbacks.notify.url=${oc.env:WEBHOOK}", "eval.execute_code=true"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    facts = collect_facts(tmp_path, results={}, best=None, device=torch.device("cpu"))
    given = shlex.split(facts.resume)
    assert given == ["python", "train.py", f"resume={tmp_path}", *words[1:]]
