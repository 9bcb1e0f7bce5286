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

MARKS = ("resume", "output_dir", "run_name", "tags")  # no settings of the training


@dataclass(frozen=True)
class Run:
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


def read_runs(folder: Path, metric: str, tags: Collection[str] = ()) -> list[Run]:
    """The runs below a folder that have all of the tags; DataError if none of them has logged the metric."""
    files = sorted(folder.rglob("metrics.csv"), key=lambda path: [_natural(part) for part in path.parts])
    if not files:
        raise DataError(f"{folder}: no metrics.csv below it: give a run or multirun folder (logger=csv writes it)")
    runs, names, known = [], set(), set()
    for path in files:
        steps, values = [], []
        run_name, run_tags = _marks(path.parent)
        known |= run_tags
        if not run_tags.issuperset(tags):
            continue
        with path.open(newline="", encoding="utf-8") as file:
            for row in _rows(file, path):
                names |= {name for name in row if name}
                value, step = number(row.get(metric) or ""), row.get("step") or ""
                if value is not None and math.isfinite(value) and step.isdecimal():
                    steps.append(int(step))
                    values.append(value)
        name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.name
        if run_name is not None and not path.parent.name.startswith(run_name):
            name = f"{name} ({run_name})"
        chosen = _loaded(path.parent / ".hydra" / "hydra.yaml", "hydra", "runtime", "choices").get("objective")
        objective = chosen if isinstance(chosen, str) and chosen.isprintable() else ""
        runs.append(Run(name, _settings(path.parent), run_tags, objective, steps, values))
    if not runs and not names and tags:
        raise DataError(
            f"{folder}: no run has the tags {', '.join(tags)}; there are: {', '.join(sorted(known)) or 'none'}"
        )
    if not any(run.values for run in runs):
        raise DataError(f"{folder}: no run has logged {metric}; there are: {', '.join(sorted(names - {'step'}))}")
    return runs


def _rows(file: TextIO, path: Path) -> Iterator[dict[str, str]]:
    try:
        yield from csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a table ({type(error).__name__})") from None


def varied(runs: list[Run]) -> list[str]:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if len({run.settings.get(name) for run in runs}) > 1]


def _settings(run: Path) -> dict[str, str]:
    """The overrides of a run, which the sweep has varied."""
    path = run / ".hydra" / "overrides.yaml"
    given = read_overrides(path) if path.is_file() else []
    pairs = ["".join(c if c.isprintable() else "?" for c in redact(o)).partition("=") for o in given]
    return {name.lstrip("+~"): value for name, _, value in pairs if name not in MARKS}


def _loaded(path: Path, *keys: str) -> dict[str, object]:
    """The mapping in a small YAML file, under these keys of it; empty where there is none."""
    found = read_untrusted_yaml(path) if path.is_file() else {}
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _marks(run: Path) -> tuple[str | None, frozenset[str]]:
    """The name and the tags that a run was given; as its configuration says, which has them from wherever they came."""
    found = _loaded(run / ".hydra" / "config.yaml")
    name, tags = found.get("run_name"), found.get("tags")
    listed = tags if isinstance(tags, list) else []
    return name if isinstance(name, str) else None, frozenset(tag for tag in listed if isinstance(tag, str))


def number(text: str) -> float | None:
    """The number that a text is; None for what is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _natural(part: str) -> tuple[int, int, str]:
    """Numbers by their size, before names."""
    return (0, int(part), "") if part.isdigit() else (1, 0, part)
