"""`profile=true` shows where the time of a step goes."""

import json
import re
from pathlib import Path

from tests.conftest import TINY


def test_a_trace_is_written_and_the_costliest_operations_are_named(command, tmp_path: Path) -> None:
    result = command("train", *TINY, "trainer.max_steps=7", "profile=true", "hydra.run.dir=run")
    assert result.status == 0, result.err
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert any(event["name"] == "aten::mm" for event in events)
    shares = [float(share) for share in re.findall(r"^ +([\d.]+)% +[\d.]+ ms", result.out, re.MULTILINE)]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.5


def test_a_run_of_few_batches_says_that_there_is_no_profile(command, tmp_path: Path) -> None:
    result = command("train", *TINY, "trainer.max_steps=2", "profile=true", "hydra.run.dir=run")
    assert result.status == 0, result.err
    assert "profile     none: it takes 3 batches" in result.out
    assert not (tmp_path / "run" / "trace.json").exists()
