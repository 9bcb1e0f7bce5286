"""The runs below a folder as they lie there: what they were given, what they trained, and a metric by step."""

import csv
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from genai_pl.config.redaction import redact
from genai_pl.errors import DataError
from genai_pl.training.trust import read_overrides, read_untrusted_yaml

LABELS = ("resume", "output_dir", "run_name", "tags")  # no settings of the training


@dataclass(frozen=True)
class ComparedRun:
    """One run: the settings it was given, what it trained, and a metric by step, which it may not have logged."""

    name: str
    settings: dict[str, str]
    tags: frozenset[str]
    objective: str
    steps: list[int]
    values: list[float]

    def best(self, *, greater: bool) -> tuple[float, int]:
        """The best value and its step."""
        pairs = list(zip(self.values, self.steps, strict=True))
        return max(pairs, key=lambda p: p[0]) if greater else min(pairs, key=lambda p: p[0])


def read_runs(folder: Path, metric: str, tags: Collection[str] = ()) -> list[ComparedRun]:
    """The runs below a folder that have all of the tags; DataError if none of them has logged the metric."""
    files = sorted(folder.rglob("metrics.csv"), key=lambda path: [_natural_order(part) for part in path.parts])
    if not files:
        raise DataError(f"{folder}: no metrics.csv below it: give a run or multirun folder (logger=csv writes it)")
    runs, metric_names, known_tags = [], set(), set()
    for path in files:
        steps, values = [], []
        run_name, run_tags = _name_and_tags(path.parent)
        known_tags |= run_tags
        if not run_tags.issuperset(tags):
            continue
        with path.open(newline="", encoding="utf-8") as file:
            for row in _rows(file, path):
                metric_names |= {name for name in row if name}
                value, step = parse_number(row.get(metric) or ""), row.get("step") or ""
                if value is not None and math.isfinite(value) and step.isdecimal():
                    steps.append(int(step))
                    values.append(value)
        name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.name
        if run_name is not None and not path.parent.name.startswith(run_name):
            name = f"{name} ({run_name})"
        choices = _read_mapping(path.parent / ".hydra" / "hydra.yaml", "hydra", "runtime", "choices")
        choice = choices.get("objective")
        objective = choice if isinstance(choice, str) and choice.isprintable() else ""
        runs.append(ComparedRun(name, _settings(path.parent), run_tags, objective, steps, values))
    if not runs and not metric_names and tags:
        raise DataError(
            f"{folder}: no run has the tags {', '.join(tags)}; there are: {', '.join(sorted(known_tags)) or 'none'}"
        )
    if not any(run.values for run in runs):
        raise DataError(
            f"{folder}: no run has logged {metric}; there are: {', '.join(sorted(metric_names - {'step'}))}"
        )
    return runs


def _rows(file: TextIO, path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table ({type(error).__name__})") from None


def varied_settings(runs: list[ComparedRun]) -> list[str]:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def _settings(run: Path) -> dict[str, str]:
    """The overrides of a run, which the sweep has varied."""
    path = run / ".hydra" / "overrides.yaml"
    overrides = read_overrides(path) if path.is_file() else []
    pairs = ["".join(c if c.isprintable() else "?" for c in redact(o)).partition("=") for o in overrides]
    return {name.lstrip("+~"): value for name, _, value in pairs if name not in LABELS}


def _read_mapping(path: Path, *keys: str) -> dict[str, object]:
    """The mapping in a small YAML file, under these keys of it; empty where there is none."""
    contents = read_untrusted_yaml(path) if path.is_file() else {}
    for key in keys:
        contents = contents.get(key) if isinstance(contents, dict) else None
    return contents if isinstance(contents, dict) else {}


def _name_and_tags(run: Path) -> tuple[str | None, frozenset[str]]:
    """The name and the tags that a run was given; as its configuration says, which has them from wherever they came."""
    config = _read_mapping(run / ".hydra" / "config.yaml")
    name, tags = config.get("run_name"), config.get("tags")
    tag_list = tags if isinstance(tags, list) else []
    return name if isinstance(name, str) else None, frozenset(tag for tag in tag_list if isinstance(tag, str))


def parse_number(text: str) -> float | None:
    """The number that a text is; None for what is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _natural_order(part: str) -> tuple[int, int, str]:
    """Numbers by their size, before names."""
    return (0, int(part), "") if part.isdigit() else (1, 0, part)
