"""Watched metrics: which checkpoint counts as the best, and when a run ends early, from the options of callbacks."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig

from genai_pl.callbacks import BestCheckpoint, EarlyStop
from genai_pl.callbacks.best import BENCHMARK
from genai_pl.config.metric_modes import GREATER, LESS, greater_is_better
from genai_pl.errors import ConfigError

DEFAULT = "val/loss"  # metric of early stopping
Measured = Mapping[str, Sequence[str]]  # metrics of each task of benchmarks, the one by which it is known first


def choose_best(config: DictConfig, folder: Path, measured: Measured) -> BestCheckpoint | None:
    """What keeps the best checkpoint of a run, None where none is asked for; ConfigError for options that do not fit.

    folder: of its checkpoints. measured: by benchmarks.
    """
    options = config.callbacks.checkpoint
    if options.best is None:
        if config.callbacks.export == "best":
            raise ConfigError("callbacks.export=best: set callbacks.checkpoint.best=val/loss, the metric that decides")
        return None
    metric = _find_metric(config, "callbacks.checkpoint.best", options.best, measured)
    greater = _is_greater_better(metric, options.mode, "callbacks.checkpoint.mode")
    return BestCheckpoint(folder, metric, greater=greater)


def choose_early_stop(config: DictConfig, measured: Measured) -> EarlyStop | None:
    """What ends a run early, None without a patience; ConfigError for options that do not fit."""
    options = config.callbacks.early_stopping
    if options.patience is None:
        return None
    metric = options.metric or config.callbacks.checkpoint.best or DEFAULT
    mode = options.mode or (config.callbacks.checkpoint.mode if options.metric is None else None)
    metric = _find_metric(config, "callbacks.early_stopping.metric", metric, measured)
    greater = _is_greater_better(metric, mode, "callbacks.early_stopping.mode")
    return EarlyStop(metric, greater=greater, patience=options.patience, min_delta=float(options.min_delta))


def _find_metric(config: DictConfig, option: str, metric: str, measured: Measured) -> str:
    """The full name of a metric; ConfigError for one that neither a validation nor benchmarks can measure."""
    if metric.startswith(BENCHMARK):
        return _find_benchmark(option, metric, measured)
    if not metric.startswith("val/"):
        raise ConfigError(
            f"{option}={metric}: expected a metric of the validation, such as val/loss, or of eval.tasks, as eval/NAME"
        )
    if not config.trainer.limit_val_batches:
        raise ConfigError(f"{option}={metric}: nothing is validated, trainer.limit_val_batches=0")
    return metric


def _find_benchmark(option: str, metric: str, measured: Measured) -> str:
    """The full name of a benchmark's metric; `eval/NAME` alone is the one by which the task is known.

    >>> _find_benchmark("best", "eval/qa", {"qa": ["accuracy", "chance"]})
    'eval/qa/accuracy'
    """
    if not measured:
        raise ConfigError(
            f"{option}={metric}: nothing is measured; give eval.every_n_steps=100 and eval.tasks.NAME=FILE"
        )
    task, _, name = metric.removeprefix(BENCHMARK).partition("/")
    if task in measured and not name:
        return f"{BENCHMARK}{task}/{measured[task][0]}"
    names = [f"{BENCHMARK}{task}/{name}" for task, of_task in measured.items() for name in of_task]
    if metric not in names:
        near = get_close_matches(metric, names, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{option}={metric}: no such metric{hint}; eval.tasks measure {', '.join(names)}")
    return metric


def _is_greater_better(metric: str, mode: str | None, option: str) -> bool:
    """Whether a greater value is better; ConfigError where neither the mode nor the name of the metric says so."""
    guessed = greater_is_better(metric) if mode is None else mode == "max"
    if guessed is None:
        group, slash, name = metric.rpartition("/")
        near = get_close_matches(name, sorted(GREATER | LESS), n=1)
        hint = f"did you mean {group}{slash}{near[0]}? If not, " if near else ""
        raise ConfigError(f"{option}=null: the name {metric} does not tell what is better: {hint}set it to min or max")
    return guessed


def describe_watched(best: BestCheckpoint | None, stop: EarlyStop | None, *, exports: bool) -> list[str]:
    """Lines on what is watched.

    exports: whether the best checkpoint is exported.
    """
    lines = []
    if best is not None:
        exported = ", exported at the end" if exports else ""
        lines.append(f"best        {best.metric}, {_words(best.greater)}: kept as {best.path}{exported}")
    if stop is not None:
        word = "measurement" if stop.of_benchmarks else "validation"
        n = f"{stop.patience} {word}{'s' * (stop.patience != 1)}"
        least = f" by more than {stop.min_delta:g}" if stop.min_delta else ""
        lines.append(f"early stop  after {n} in which {stop.metric} has not improved{least}, {_words(stop.greater)}")
    return lines


def _words(greater: bool) -> str:
    return "greater is better" if greater else "lower is better"
