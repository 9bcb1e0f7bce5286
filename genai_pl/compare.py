"""The runs of a sweep beside each other: what differs in their settings, how their metric went, and which won."""

import argparse
import csv
import math
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from genai_pl.errors import DataError, UserError
from genai_pl.files import write_atomic
from genai_pl.masking import masked
from genai_pl.trust import read_overrides, read_plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREATER_IS_BETTER = ("accuracy", "accuracies", "scores", "margins", "rlhf_reward", "tokens_per_sec", "mfu", "recall@1")
MARKS = ("resume", "output_dir", "run_name", "tags")  # no settings of the training
MOST_CURVES = 12  # in one picture


@dataclass(frozen=True)
class Run:
    """One run: the settings it was given, and a metric by step."""

    name: str
    settings: dict[str, str]
    tags: frozenset[str]
    steps: list[int]
    values: list[float]

    def best(self, *, greater: bool) -> tuple[float, int]:
        """The best value and its step."""
        pairs = list(zip(self.values, self.steps, strict=True))
        return max(pairs, key=lambda p: p[0]) if greater else min(pairs, key=lambda p: p[0])


def read_runs(folder: Path, metric: str, tags: Collection[str] = ()) -> list[Run]:
    """The runs below a folder that have logged the metric and have all of the tags; DataError if there is none."""
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
                value, step = _number(row.get(metric) or ""), row.get("step") or ""
                if value is not None and math.isfinite(value) and step.isdecimal():
                    steps.append(int(step))
                    values.append(value)
        if values:
            name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.name
            if run_name is not None and not path.parent.name.startswith(run_name):
                name = f"{name} ({run_name})"
            runs.append(Run(name, _settings(path.parent), run_tags, steps, values))
    if not runs and not names and tags:
        raise DataError(
            f"{folder}: no run has the tags {', '.join(tags)}; there are: {', '.join(sorted(known)) or 'none'}"
        )
    if not runs:
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


def table(runs: list[Run], metric: str, *, greater: bool) -> list[str]:
    """Lines of text, the best run first."""
    names = varied(runs)
    ranked = sorted(runs, key=lambda run: run.best(greater=greater)[0], reverse=greater)
    tagged = ["tags"] if any(run.tags for run in runs) else []
    rows = [["run", *tagged, *names, f"best {metric}", "at step", "last"]]
    for run in ranked:
        value, step = run.best(greater=greater)
        given = [run.settings.get(name, "") for name in names]
        tags = [", ".join(sorted(run.tags))] if tagged else []
        rows.append([run.name, *tags, *given, f"{value:.4f}", f"{step:,}", f"{run.values[-1]:.4f}"])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def draw(runs: list[Run], metric: str, path: Path, *, greater: bool) -> None:
    """Write a PNG: the metric by step and, where settings differ, each run as a line through its settings to its best value."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("compare.py draws with matplotlib: pip install -e '.[plots]', or give --no-picture") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    ranked = sorted(runs, key=lambda run: run.best(greater=greater)[0], reverse=greater)
    names = varied(runs)
    figure, axes = pyplot.subplots(1, 2 if names else 1, figsize=(13 if names else 7, 4.5), squeeze=False)
    colors = mpl.colormaps["viridis"](_spread(len(ranked)))
    _curves(axes[0, 0], ranked, metric, names, colors)
    if names:
        _coordinates(axes[0, 1], ranked, metric, names, colors, greater=greater)
    figure.tight_layout()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)


def _curves(axes: "Axes", ranked: list[Run], metric: str, names: list[str], colors: object) -> None:
    for run, color in list(zip(ranked, colors, strict=True))[:MOST_CURVES]:
        label = ", ".join(f"{name.rpartition('.')[2]}={run.settings.get(name, '')}" for name in names) or run.name
        axes.plot(run.steps, run.values, color=color, marker="." if len(run.steps) < 30 else None, label=label)
    more = f" (the best {MOST_CURVES} of {len(ranked)})" if len(ranked) > MOST_CURVES else ""
    axes.set(xlabel="step", ylabel=metric, title=f"{metric} by step{more}")
    axes.legend(fontsize=7)


def _coordinates(
    axes: "Axes", ranked: list[Run], metric: str, names: list[str], colors: object, *, greater: bool
) -> None:
    """Parallel coordinates: an axis for each setting, and the last one for the metric."""
    columns = [[run.settings.get(name, "") for run in ranked] for name in names]
    scales = [_scale(column) for column in columns]
    best = [run.best(greater=greater)[0] for run in ranked]
    low, high = min(best), max(best)
    heights = [(value - low) / ((high - low) or 1) for value in best]
    for n, color in list(enumerate(colors))[::-1]:  # the best on top
        places = [scale[column[n]] for scale, column in zip(scales, columns, strict=True)]
        axes.plot(range(len(names) + 1), [*places, heights[n]], color=color, linewidth=3 if n == 0 else 1.5)
    for x, scale in enumerate(scales):
        for value, height in scale.items():
            axes.annotate(value, (x, height), fontsize=8, xytext=(3, 3), textcoords="offset points")
    for value in {low, high}:
        place = (len(names), (value - low) / ((high - low) or 1))
        axes.annotate(f"{value:.4g}", place, fontsize=8, xytext=(3, 3), textcoords="offset points")
    axes.set_xticks(range(len(names) + 1), [*names, metric], fontsize=8)
    axes.set(yticks=[], ylim=(-0.05, 1.1), title="settings to the best value; thick: the winner")
    for x in range(len(names) + 1):
        axes.axvline(x, color="0.8", zorder=0)


def _scale(column: list[str]) -> dict[str, float]:
    """The height of each value between 0 and 1, by size of numbers, otherwise by the alphabet."""
    values = sorted(set(column), key=lambda v: (_number(v) is None, _number(v) or 0.0, v))
    return dict(zip(values, _spread(len(values)), strict=True))


def _spread(n: int) -> list[float]:
    return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]


def _settings(run: Path) -> dict[str, str]:
    """The overrides of a run, which the sweep has varied."""
    path = run / ".hydra" / "overrides.yaml"
    given = read_overrides(path) if path.is_file() else []
    pairs = ["".join(c if c.isprintable() else "?" for c in masked(o)).partition("=") for o in given]
    return {name.lstrip("+~"): value for name, _, value in pairs if name not in MARKS}


def _marks(run: Path) -> tuple[str | None, frozenset[str]]:
    """The name and the tags that a run was given; as its configuration says, which has them from wherever they came."""
    path = run / ".hydra" / "config.yaml"
    found = read_plain(path) if path.is_file() else {}
    name, tags = (found.get("run_name"), found.get("tags")) if isinstance(found, dict) else (None, None)
    listed = tags if isinstance(tags, list) else []
    return name if isinstance(name, str) else None, frozenset(tag for tag in listed if isinstance(tag, str))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _natural(part: str) -> tuple[int, int, str]:
    """Numbers by their size, before names."""
    return (0, int(part), "") if part.isdigit() else (1, 0, part)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__)
    parser.add_argument("folder", type=Path, help="a multirun folder, or any folder with runs below it")
    parser.add_argument("--metric", default="val/loss", help="the metric that decides")
    parser.add_argument(
        "--max", action="store_true", help="greater is better (known of accuracies, rewards and speeds)"
    )
    parser.add_argument(
        "--tag", action="append", default=[], help="only runs with this tag (tags=[...] of train.py); may be repeated"
    )
    parser.add_argument("--out", type=Path, help="the picture; default: FOLDER/compare.png")
    parser.add_argument("--no-picture", action="store_true", help="the table alone")
    args = parser.parse_args()
    greater = args.max or args.metric.rpartition("/")[2] in GREATER_IS_BETTER
    try:
        runs = read_runs(args.folder, args.metric, args.tag)
        print(*table(runs, args.metric, greater=greater), sep="\n")
        if not args.no_picture:
            out = args.out or args.folder / "compare.png"
            draw(runs, args.metric, out, greater=greater)
            print(f"picture: {out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
