"""Best checkpoint and early stopping: what a run keeps, and when it ends, by a metric of its validations or benchmarks.

Both remember the metric of every validation by step, as part of the checkpoint. A validation that a resumed run makes
again replaces its value, so a run that was killed at any moment keeps and stops where the undisturbed one does. Metrics
of benchmarks (`eval/...`) come from `callbacks/benchmarks.py` instead of validations; the rest is the same.

Checkpoints are written before the validation of their step, and after its benchmarks. The best one is therefore no file
of its own but a checkpoint that stays, under a second name. A run may be resumed from an older checkpoint, at which
another one was the best: `needed` says which stay for that.
"""

import difflib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L

from genai_pl.callbacks.checkpoint_files import link, remove_checkpoint_files
from genai_pl.errors import ConfigError

log = logging.getLogger(__name__)


BENCHMARK = "eval/"  # beginning of metrics that are measured by benchmarks, and not by validations


class Validated(NamedTuple):
    """The metric of one validation, or of one measurement of benchmarks."""

    step: int
    value: float


class MetricWatch(L.Callback):
    """Remembers a metric of all validations.

    metric: its name. greater: whether a greater value is better. option: what named it, for errors.
    history: one `Validated` for each validation, in order of steps
    """

    def __init__(self, metric: str, *, greater: bool, option: str) -> None:
        self.metric, self.greater, self.option = metric, greater, option
        self.history: list[Validated] = []

    @property
    def of_benchmarks(self) -> bool:
        """Whether benchmarks measure the metric, and not validations."""
        return self.metric.startswith(BENCHMARK)

    def state_dict(self) -> dict[str, object]:
        return {"metric": self.metric, "history": [list(validated) for validated in self.history]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take over the history, if it is of the same metric."""
        if state["metric"] == self.metric:
            self.history = [Validated(int(step), float(value)) for step, value in state["history"]]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Remember the value; ConfigError for a metric that validation does not measure."""
        if module.validation_cut or self.of_benchmarks:
            return
        if self.metric not in trainer.callback_metrics:
            names = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
            near = difflib.get_close_matches(self.metric, names, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{self.option}={self.metric}: no such metric{hint}; validation measures {', '.join(names) or 'none'}"
            )
        found = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        self.remember(trainer, found)

    def remember(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        """Note the value of this step, and act on it; the same on all ranks. metrics: all that were measured with it."""
        step = trainer.global_step
        self.history = [seen for seen in self.history if seen.step < step]
        self.history.append(Validated(step, float(metrics[self.metric])))
        self.validated(trainer, metrics)

    def validated(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        """Act on the new value; the same on all ranks."""

    def improvements(self, min_delta: float = 0.0) -> list[Validated]:
        """Validations that were better than all before them, by more than min_delta; a value that is not finite is never."""
        found: list[Validated] = []
        for seen in self.history:
            gain = math.inf if not found else (seen.value - found[-1].value) * (1 if self.greater else -1)
            if math.isfinite(seen.value) and gain > min_delta:
                found.append(seen)
        return found


class BestCheckpoint(MetricWatch):
    """Keeps the checkpoint with the best metric, as `best.ckpt` beside the newest.

    folder: of the checkpoints. metrics: all metrics of the validation, or of the benchmarks, of the best step
    """

    def __init__(self, folder: Path, metric: str, *, greater: bool) -> None:
        super().__init__(metric, greater=greater, option="callbacks.checkpoint.best")
        self.folder = folder
        self.metrics: dict[str, float] = {}

    @property
    def path(self) -> Path:
        """The second name of the best checkpoint."""
        return self.folder / "best.ckpt"

    @property
    def best(self) -> Validated | None:
        """The best validation so far."""
        found = self.improvements()
        return found[-1] if found else None

    @property
    def file_name(self) -> str | None:
        """The name of the best checkpoint, None before there is one."""
        return None if self.best is None else f"step={self.best.step:06d}.ckpt"

    def state_dict(self) -> dict[str, object]:
        return {**super().state_dict(), "metrics": self.metrics}

    def load_state_dict(self, state: dict[str, object]) -> None:
        super().load_state_dict(state)
        if state["metric"] == self.metric:
            self.metrics = {name: float(value) for name, value in state["metrics"].items()}

    def validated(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        """Name the checkpoint of this step the best one, if it is."""
        if self.best is None or self.best.step != trainer.global_step:
            return
        self.metrics = dict(metrics)
        if trainer.is_global_zero:
            self.point()

    def measured_at(self, step: int) -> bool:
        """Whether the metric of this step is known already."""
        return bool(self.history) and self.history[-1].step == step

    def needed(self, steps: Iterable[int]) -> set[int]:
        """Steps of the best checkpoints now, and at each of these steps, from which a run may go on."""
        found = self.improvements()
        before = [[seen.step for seen in found if seen.step < step] for step in steps]
        return {seen[-1] for seen in before if seen} | {seen.step for seen in found[-1:]}

    def point(self) -> None:
        """Let `best.ckpt` name the best checkpoint; nothing while that is still being written."""
        if (name := self.file_name) is None:
            return
        present = [path for path in (self.folder / name, self.folder / f"aside-{name}") if path.exists()]
        if present:
            link(present[0], self.path)

    def rewind(self) -> None:
        """Point at the best one before a resumed run; those of later steps, which are made again, are set aside by now."""
        if self.best is not None and not (self.folder / self.file_name).exists():
            log.warning("best        the checkpoint of step %d is gone: the best is counted anew", self.best.step)
            self.history, self.metrics = [], {}
        if self.best is None:
            self.path.unlink(missing_ok=True)
        self.point()

    def describe(self) -> str:
        """The best step and its value."""
        return "none yet" if self.best is None else f"step {self.best.step}, {self.metric} {self.best.value:.4g}"


class EarlyStop(MetricWatch):
    """Ends the run after `patience` validations without an improvement of the metric by more than `min_delta`.

    stopped: whether it has
    """

    def __init__(self, metric: str, *, greater: bool, patience: int, min_delta: float) -> None:
        super().__init__(metric, greater=greater, option="callbacks.early_stopping.metric")
        self.patience, self.min_delta = patience, min_delta
        self.stopped = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop a resumed run that had come to its end; a validation is made again, and stops it then."""
        if self.of_benchmarks and self.history and self.waited >= self.patience:
            self.validated(trainer, {})

    @property
    def waited(self) -> int:
        """Validations since the last improvement."""
        found = self.improvements(self.min_delta)
        return sum(seen.step > (found[-1].step if found else -1) for seen in self.history)

    def validated(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        """Stop training, if the patience is at its end; the last step may have been made anyway."""
        if self.waited < self.patience or self.stopped:
            return
        self.stopped = trainer.should_stop = True
        if trainer.is_global_zero and trainer.fit_loop.epoch_loop.global_step < trainer.fit_loop.epoch_loop.max_steps:
            log.info("%s", self.describe(trainer.global_step))

    def describe(self, step: int) -> str:
        """The line that says why a run has ended."""
        found = self.improvements(self.min_delta)
        best = f"; it last improved at step {found[-1].step}, to {found[-1].value:.4g}" if found else ""
        word = "measurement" if self.of_benchmarks else "validation"
        n = f"{self.waited} {word}{'s' * (self.waited != 1)}"
        return f"early stop  at step {step}: {self.metric} has not improved in {n}{best}"


def remove_old(steps: Sequence[Path], keep: int, best: BestCheckpoint | None) -> None:
    """Remove all checkpoints but the last `keep` of the list, ordered by step, and those that `best` needs."""
    numbers = [int(path.name.removeprefix("step=").removesuffix(".ckpt")) for path in steps]
    needed = set() if best is None else best.needed(numbers[-keep:])
    for path, number in list(zip(steps, numbers, strict=True))[:-keep]:
        if number not in needed:
            remove_checkpoint_files(path)
