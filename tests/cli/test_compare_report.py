"""compare.html ranks runs, draws them, and says how much each option explains, as an analysis of variance does."""

import re
from pathlib import Path

import numpy as np
import pytest

from genai_pl.cli.compare import read_runs, write_report
from genai_pl.reporting.importance import importance
from tests.training.test_run_report import Page


def test_an_importance_is_the_eta_squared_of_scipys_analysis_of_variance() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    groups = [rng.normal(mean, 1, size=n) for mean, n in ((0, 5), (0.5, 4), (2, 6))]
    f = stats.f_oneway(*groups).statistic
    k, n = len(groups), sum(map(len, groups))
    expected = f * (k - 1) / (f * (k - 1) + n - k)
    column = [str(i) for i, group in enumerate(groups) for _ in group]
    assert importance(column, np.concatenate(groups).tolist()) == pytest.approx(expected)


def test_an_option_that_is_different_in_every_run_or_the_same_in_all_explains_nothing() -> None:
    assert importance(["a", "b", "c", "d"], [1.0, 2.0, 3.0, 4.0]) is None
    assert importance(["a"] * 4, [1.0, 2.0, 3.0, 4.0]) is None
    assert importance(["a", "a", "b", "b"], [1.0, 1.0, 2.0, 2.0]) == 1.0


def test_the_report_of_a_sweep_ranks_it_and_links_the_reports_of_its_runs(tmp_path: Path) -> None:
    for n, (lr, layers, loss) in enumerate([("1e-3", 1, 3.0), ("1e-2", 1, 2.0), ("1e-3", 2, 2.9), ("1e-2", 2, 1.9)]):
        run = tmp_path / str(n)
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text(f"- optimizer.lr={lr}\n- model.n_layer={layers}\n- seed=<1>\n")
        (run / "metrics.csv").write_text(f"step,val/loss\n10,4.0\n20,{loss}\n")
        (run / "report.html").touch()
    runs = read_runs(tmp_path, "val/loss")
    path = tmp_path / "compare.html"
    write_report(runs, "val/loss", path, title="a <sweep>", greater=False, notes=["note: one & two"])
    text = path.read_text()
    page = Page(text)
    names = re.findall(r'<a href="(\d)/report.html">\d</a>', text)
    assert names == ["3", "1", "2", "0"]
    # a full grid of lr (effect 1.0) and layers (effect 0.1): shares by hand, 1 / 1.01 and 0.01 / 1.01
    assert {"99%", "1%"} <= set(page.texts)
    assert "one & two" in page.texts
    # parallel coordinates: one line for each run, the best one thick and last
    lines = re.findall(r'<polyline class="line (c1|c0 faint)"', text.partition("Settings and the best")[2])
    assert lines == ["c0 faint"] * 3 + ["c1"]
