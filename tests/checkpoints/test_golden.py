"""Checkpoints of an earlier version (format 1, written in November 2026): they load and continue as they did then.

`golden/expected.json` holds what that version computed: the last logits of a sentence, the loss of each of four steps, and
the keys of the state dict. The checkpoints are those of step 2.
"""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genai_pl import train
from genai_pl.loading import load

HERE = Path(__file__).parent
GOLDEN, ROOT = HERE / "golden", HERE.parent.parent
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
KINDS = ("file", "adapter", "sharded")


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, in the place from which their relative paths lead."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_an_earlier_checkpoint_are_what_they_were(golden: Path, kind: str) -> None:
    model = load(f"{kind}/checkpoints/step=000002.ckpt").model.eval()
    ids = torch.tensor([list(b"the quick brown fox")])
    with torch.no_grad():
        logits = model(ids)[0]
    torch.testing.assert_close(logits[-1, :8], torch.tensor(EXPECTED[kind]["logits"]), atol=2e-6, rtol=1e-5)
    assert logits.double().norm().item() == pytest.approx(EXPECTED[kind]["norm"], rel=1e-5)


def test_the_keys_of_a_state_dict_are_what_they_were(golden: Path) -> None:
    assert sorted(load("file/checkpoints/step=000002.ckpt").model.state_dict()) == EXPECTED["state_dict"]


@pytest.mark.parametrize("kind", ["file", "adapter"])
def test_an_earlier_run_goes_on_with_the_losses_that_it_had(golden: Path, kind: str) -> None:
    train(f"resume={kind}")
    _check_losses(kind)


@pytest.mark.slow
def test_an_earlier_sharded_run_goes_on_with_the_losses_that_it_had(golden: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "resume=sharded"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _check_losses("sharded")


def _check_losses(kind: str) -> None:
    """The steps after the checkpoint have the losses of the earlier version."""
    with (Path(kind) / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert [losses[step] for step in (3, 4)] == pytest.approx(EXPECTED[kind]["losses"][2:], rel=1e-5)
    assert float(rows[-1]["val/loss"]) == pytest.approx(EXPECTED[kind]["val_loss"], rel=1e-5)
