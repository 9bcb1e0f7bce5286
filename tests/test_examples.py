"""Every script of examples/ runs with few steps."""

import importlib
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHORT = ("trainer.max_steps=3", "trainer.limit_val_batches=1", "callbacks.samples.every_n_steps=null")
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    results = importlib.import_module(name).main(*SHORT)
    if name == "finetune":
        assert results["merged"] == results["adapter"]
    if name == "align":
        assert all(0 <= score <= 1 for score in results)
    assert results
