"""Console output of a run: an aligned line per log interval, and on a terminal a progress bar with the time left.

The rows are those of the Monitor, so the console prints what the files hold.
"""

import sys
import time

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from genai_pl.modules.base import BaseModule
from genai_pl.modules.columns import Column

COLUMNS = (  # after those of the objective
    Column("train/lr", "lr", "{:8.2e}"),
    Column("train/grad_norm", "grad norm", "{:9.3f}"),
    Column("train/skipped_steps", "skipped", "{:7.0f}"),  # with fp16
    Column("train/tokens_per_sec", "tok/s", "{:9,.0f}"),
    Column("train/mfu", "MFU", "{:6.1%}"),
    Column("train/memory_gib", "GiB", "{:6.2f}"),
    Column("train/data_wait", "wait", "{:6.1%}"),
)


class Console(ProgressBar):
    """Prints the Monitor's rows, validation metrics, and a bar where stdout is a terminal.

    Columns are the objective's (`module.columns`) and COLUMNS; a column without a value is left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bar = None
        self._columns = (*BaseModule.columns, *COLUMNS)
        self._rows = 0
        self._start = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Nothing: Lightning disables progress bars on other ranks, and here each method checks the rank itself."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the objective's columns, start the clock, and open the bar."""
        self._columns = (*module.columns, *COLUMNS)
        self._start, self._first_step = time.perf_counter(), trainer.global_step
        if sys.stdout.isatty() and trainer.is_global_zero:
            from tqdm import tqdm

            self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if self._bar is not None:
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """Print one row of training metrics, the headings before every twentieth."""
        columns = [column for column in self._columns if column.metric in metrics]
        if self._rows % 20 == 0:
            names = [column.heading.rjust(len(column.form.format(0))) for column in columns]
            self.say("  ".join(["    step", *names, "    left"]))
        self._rows += 1
        cells = [column.form.format(metrics[column.metric]) for column in columns]
        self.say("  ".join([f"{step:8d}", *cells, f"{self._left(step):>8}"]))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Print the metrics of a complete validation in one line."""
        if module.validation_cut or not trainer.is_global_zero:
            return
        values = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        text = "  ".join(f"{k} {float(v):.4f}" for k, v in values.items())
        self.say(f"{trainer.global_step:8d}  {text}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)

    def print(self, *args: object, **_: object) -> None:
        """Print Lightning's own messages, above the bar."""
        self.say(" ".join(str(a) for a in args))

    def _left(self, step: int) -> str:
        """The time left at the mean speed so far, as text; empty where no end is known."""
        done = step - self._first_step
        total = self.trainer.max_steps
        if total < 0 or done <= 0:
            return ""
        return duration((time.perf_counter() - self._start) / done * (total - step))


def duration(seconds: float) -> str:
    """Seconds as people read them.

    >>> duration(42), duration(185), duration(7800)
    ('42s', '3m05s', '2h10m')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
