"""Runs on disk for comparison: settings, tags, objective and one metric by step, from each run folder.

Folders may come from anywhere: YAML is read with trust's limits, values are printed without control characters.
"""

import csv
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from genai_pl.config.metric_modes import BOUNDS, headline
from genai_pl.config.redaction import redact
from genai_pl.errors import DataError
from genai_pl.training.trust import read_overrides, read_untrusted_yaml

EVALUATION = "eval/"  # beginning of the metrics of benchmarks
LABELS = ("resume", "output_dir", "run_name", "tags")  # no settings of the training


@dataclass(frozen=True)
class ComparedRun:
    """One run folder.

    name: path below the compared folder, with run_name where it differs. settings: override to value. tags: of
    run_name's neighbour `tags`. objective: the group's choice, "" if unknown. steps, values: the metric where
    it was logged, equal lengths. folder: of the run. intervals: step to the metric's 95 % interval, where it has one.
    evaluations: last value of each metric of benchmarks, `eval/...`.
    """

    name: str
    settings: dict[str, str]
    tags: frozenset[str]
    objective: str
    steps: list[int]
    values: list[float]
    folder: Path = Path()
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)
    evaluations: dict[str, float] = field(default_factory=dict)

    def best(self, *, greater: bool) -> tuple[float, int]:
        """Best value and its step."""
        pairs = list(zip(self.values, self.steps, strict=True))
        return max(pairs, key=lambda p: p[0]) if greater else min(pairs, key=lambda p: p[0])


def read_runs(folder: Path, metric: str, tags: Collection[str] = ()) -> list[ComparedRun]:
    """Runs below a folder that have all the tags, in natural order of their paths; DataError if none has logged
    the metric.
    """
    files = sorted(folder.rglob("metrics.csv"), key=lambda path: [_natural_order(part) for part in path.parts])
    if not files:
        raise DataError(f"{folder}: no metrics.csv below it: give a run or multirun folder (logger=csv writes it)")
    runs, metric_names, known_tags = [], set(), set()
    for path in files:
        steps, values, intervals, evaluations = [], [], {}, {}
        run_name, run_tags = _name_and_tags(path.parent)
        known_tags |= run_tags
        if not run_tags.issuperset(tags):
            continue
        # the metric by step: rows of other metrics leave its cell empty
        with path.open(newline="", encoding="utf-8") as file:
            for row in _rows(file, path):
                metric_names |= {name for name in row if name}
                value, step = parse_number(row.get(metric) or ""), row.get("step") or ""
                if value is not None and math.isfinite(value) and step.isdecimal():
                    steps.append(int(step))
                    values.append(value)
                    bounds = [parse_number(row.get(metric + end) or "") for end in BOUNDS]
                    intervals |= {} if None in bounds else {int(step): tuple(bounds)}
                cells = {name: parse_number(cell or "") for name, cell in row.items() if _is_evaluation(name)}
                evaluations |= {name: cell for name, cell in cells.items() if cell is not None}
        name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.name
        if run_name is not None and not path.parent.name.startswith(run_name):
            name = f"{name} ({run_name})"
        choices = _read_mapping(path.parent / ".hydra" / "hydra.yaml", "hydra", "runtime", "choices")
        choice = choices.get("objective")
        objective = choice if isinstance(choice, str) and choice.isprintable() else ""
        runs.append(
            ComparedRun(
                *(name, _settings(path.parent), run_tags, objective, steps, values, path.parent),
                intervals=intervals,
                evaluations=evaluations,
            )
        )
    # an error names what exists
    if not runs and not metric_names and tags:
        raise DataError(
            f"{folder}: no run has the tags {', '.join(tags)}; there are: {', '.join(sorted(known_tags)) or 'none'}"
        )
    if not any(run.values for run in runs):
        raise DataError(
            f"{folder}: no run has logged {metric}; there are: {', '.join(sorted(metric_names - {'step'}))}"
        )
    return runs


def full_name(folder: Path, metric: str) -> str:
    """The metric, where `eval/NAME` stands for the one by which that task is known in the runs below a folder."""
    names: set[str] = set()
    for path in folder.rglob("metrics.csv") if metric.startswith(EVALUATION) else ():
        with path.open(newline="", encoding="utf-8") as file:
            names |= set(next(iter(_rows(file, path)), {}))
    found = headline({name.removeprefix(f"{metric}/") for name in names if name and name.startswith(f"{metric}/")})
    return metric if found is None or metric in names else f"{metric}/{found}"


def evaluation_cells(runs: list[ComparedRun]) -> tuple[list[str], list[list[str]]]:
    """Metrics by which the tasks of benchmarks are known, and for each run their last values with intervals."""
    tasks: dict[str, set[str]] = {}
    for name in (name for run in runs for name in run.evaluations):
        task, _, metric = name.rpartition("/")
        tasks.setdefault(task, set()).add(metric)
    names = [f"{task}/{metric}" for task, of_task in tasks.items() if (metric := headline(of_task))]
    return names, [[_with_interval(run.evaluations, name) for name in names] for run in runs]


def _with_interval(values: Mapping[str, float], name: str) -> str:
    """A value in words, with its interval where it has one; "" where it is missing."""
    if name not in values:
        return ""
    bounds = [values.get(name + end) for end in BOUNDS]
    return f"{values[name]:.4f}" + ("" if None in bounds else interval_words(*bounds))


def interval_words(low: float, high: float) -> str:
    """An interval behind its value."""
    return f" ({low:.3f} to {high:.3f})"


def _is_evaluation(name: str | None) -> bool:
    """Whether a column is a metric of benchmarks; None is the name of cells beyond the header."""
    return bool(name) and name.startswith(EVALUATION)


def _rows(file: TextIO, path: Path) -> Iterator[dict[str, str]]:
    """Rows of a CSV file; DataError for a file that is none."""
    try:
        yield from csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table ({type(error).__name__})") from None


def varied_settings(runs: list[ComparedRun]) -> list[str]:
    """Names of the settings in which the runs differ, in order of appearance."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def _settings(run: Path) -> dict[str, str]:
    """Overrides of a run, without labels such as its name."""
    path = run / ".hydra" / "overrides.yaml"
    overrides = read_overrides(path) if path.is_file() else []
    pairs = ["".join(c if c.isprintable() else "?" for c in redact(o)).partition("=") for o in overrides]
    return {name.lstrip("+~"): value for name, _, value in pairs if name not in LABELS}


def _read_mapping(path: Path, *keys: str) -> dict[str, object]:
    """A mapping in a small YAML file, below `keys`; {} where there is none."""
    contents = read_untrusted_yaml(path) if path.is_file() else {}
    for key in keys:
        contents = contents.get(key) if isinstance(contents, dict) else None
    return contents if isinstance(contents, dict) else {}


def _name_and_tags(run: Path) -> tuple[str | None, frozenset[str]]:
    """run_name and tags of a run's composed configuration; an experiment file may have set them, so overrides are
    not enough.
    """
    config = _read_mapping(run / ".hydra" / "config.yaml")
    name, tags = config.get("run_name"), config.get("tags")
    tag_list = tags if isinstance(tags, list) else []
    return name if isinstance(name, str) else None, frozenset(tag for tag in tag_list if isinstance(tag, str))


def parse_number(text: str) -> float | None:
    """The number that a text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def _natural_order(part: str) -> tuple[int, int, str]:
    """Sort key of a path's part: numbers by size, before names.

    >>> sorted(["10", "9", "a"], key=_natural_order)
    ['9', '10', 'a']
    """
    return (0, int(part), "") if part.isdigit() else (1, 0, part)
