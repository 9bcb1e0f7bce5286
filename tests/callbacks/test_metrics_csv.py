"""The table of metrics: complete at every moment, and one table across a crash."""

import csv
from pathlib import Path

from genai_pl.callbacks import MetricsCSV


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_are_on_disk_as_soon_as_they_are_logged_and_columns_may_come_late(tmp_path: Path) -> None:
    log = MetricsCSV(str(tmp_path / "metrics.csv"))
    log.log_metrics({"train/loss": 2.0}, step=1)
    assert read(log.path) == [{"step": "1", "train/loss": "2.0"}]
    log.log_metrics({"train/loss": 1.5}, step=2)
    log.log_metrics({"val/loss": 1.75}, step=2)
    log.log_metrics({"train/loss": 1.0}, step=3)
    assert read(log.path) == [
        {"step": "1", "train/loss": "2.0", "val/loss": ""},
        {"step": "2", "train/loss": "1.5", "val/loss": "1.75"},
        {"step": "3", "train/loss": "1.0", "val/loss": ""},
    ]


def test_a_resumed_table_forgets_what_the_checkpoint_does_not_know_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,val/loss\n1,2.0,\n2,1.5,1.7\n3,1.0,\n4,0.")
    log = MetricsCSV(str(path))
    log.resume(2)
    log.log_metrics({"train/loss": 1.1}, step=3)
    assert [(row["step"], row["train/loss"]) for row in read(path)] == [("1", "2.0"), ("2", "1.5"), ("3", "1.1")]


def test_numbers_keep_all_their_digits(tmp_path: Path) -> None:
    log = MetricsCSV(str(tmp_path / "metrics.csv"))
    log.log_metrics({"x": 0.1 + 0.2}, step=1)
    assert float(read(log.path)[0]["x"]) == 0.1 + 0.2
