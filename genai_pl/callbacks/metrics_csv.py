"""Metrics table: every logged scalar by step in one CSV file, which a resumed run continues as if it had never stopped."""

import csv
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from genai_pl.atomic_io import naming, write_atomic


class MetricsCSV(Logger):
    """A Lightning logger that writes rows of step and metrics.

    path: of the file

    A row with a new column, or one for the step of the last row (validation after training), rewrites the file
    atomically; any other is appended and flushed.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self.columns: list[str] = ["step"]
        self.rows: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Keep the rows of an earlier part of the run up to this step; incomplete rows of a crash are dropped."""
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                # a row that a crash cut short has no step, or too few columns
                self.rows = [
                    r
                    for r in reader
                    if (r["step"] or "").isdigit() and int(r["step"]) <= step and None not in r.values()
                ]
                self.columns = list(reader.fieldnames or ["step"])
            self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row, or add these metrics to the last row if it is of the same step."""
        row = {"step": str(step or 0), **{k: repr(float(v)) for k, v in metrics.items() if k != "epoch"}}
        new = [k for k in row if k not in self.columns]
        merged = bool(self.rows) and self.rows[-1]["step"] == row["step"]
        if merged:
            row = {**{k: v for k, v in self.rows.pop().items() if v}, **row}
        self.rows.append(row)
        self.columns += new
        if new or merged or not self.path.exists():
            self._rewrite()
        else:
            with naming(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(row)

    def log_hyperparams(self, *_: object, **__: object) -> None:
        """Nothing: the configuration is in .hydra, and the table holds numbers only."""

    def _rewrite(self) -> None:
        """Write all rows with the current columns, atomically."""

        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.columns, restval="")
                writer.writeheader()
                writer.writerows(self.rows)

        write_atomic(self.path, write)
