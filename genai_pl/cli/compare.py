"""Comparison of runs: a table, an HTML report and a picture of one metric over the runs of a sweep, or of any folder.

Runs are read from disk, not from a tracking server: settings from `.hydra/overrides.yaml`, metrics from metrics.csv. Only
settings that differ get a column. matplotlib is needed for the picture alone.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from genai_pl.atomic_io import write_atomic
from genai_pl.cli.compared_runs import (
    ComparedRun,
    evaluation_cells,
    full_name,
    interval_words,
    parse_number,
    read_runs,
    varied_settings,
)
from genai_pl.config.metric_modes import greater_is_better
from genai_pl.errors import DataError, UserError
from genai_pl.references import named_run, named_sweep, nearest
from genai_pl.reporting.compare_page import RankedRun, compare_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPEEDS = ("tokens_per_sec", "mfu")  # which compare whatever is trained
DESCRIPTION = (
    "The runs of a sweep beside each other: what differs in their settings, how their metric went, and which won."
)
INSTALL = "pip install -e '.[plots]'"
MAX_CURVES = 12  # in one picture


def table_notes(runs: list[ComparedRun], metric: str) -> list[str]:
    """Notes under a table: runs that have not logged the metric, and a warning where its values do not compare."""
    lines = []
    if missing := [run.name for run in runs if not run.values]:
        lines.append(
            f"{len(missing)} {'run has' if len(missing) == 1 else 'runs have'} no {metric}: {', '.join(missing)}"
        )
    objectives = sorted({run.objective for run in runs if run.values} - {""})
    if len(objectives) > 1 and metric.rpartition("/")[2] not in SPEEDS:
        lines.append(f"{metric} of different objectives does not compare: {', '.join(objectives)}")
    return [f"note: {line}" for line in lines]


def table(runs: list[ComparedRun], metric: str, *, greater: bool) -> list[str]:
    """Lines of a table with one run a line, the best first: the settings that differ, best value, its step, last
    value.
    """
    names = varied_settings(runs)
    ranked = sorted(runs, key=lambda run: run.best(greater=greater)[0], reverse=greater)
    tag_heading = ["tags"] if any(run.tags for run in runs) else []
    rows = [["run", *tag_heading, *names, f"best {metric}", "at step", "last"]]
    for run in ranked:
        _, step = run.best(greater=greater)
        values = [run.settings.get(name, "") for name in names]
        tags = [", ".join(sorted(run.tags))] if tag_heading else []
        rows.append([run.name, *tags, *values, best_words(run, greater=greater), f"{step:,}", f"{run.values[-1]:.4f}"])
    return aligned(rows)


def best_words(run: ComparedRun, *, greater: bool) -> str:
    """The best value of a run, with its 95 % interval where it has one."""
    value, step = run.best(greater=greater)
    return f"{value:.4f}" + (interval_words(*run.intervals[step]) if step in run.intervals else "")


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose columns stand below each other."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def evaluation_table(runs: list[ComparedRun]) -> list[str]:
    """Lines of a table of benchmarks with one run a line: last values with 95 % intervals; none without benchmarks."""
    names, cells = evaluation_cells(runs)
    rows = [[run.name, *row] for run, row in zip(runs, cells, strict=True)]
    return ["", *aligned([["last", *names], *rows])] if names else []


def draw(runs: list[ComparedRun], metric: str, path: Path, *, greater: bool) -> None:
    """Write a PNG: the metric by step, and beside it, where settings differ, parallel coordinates from settings to
    best values.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError(f"compare.py draws with matplotlib: {INSTALL}, or give --no-picture") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    # the best run has the first color
    ranked = sorted(runs, key=lambda run: run.best(greater=greater)[0], reverse=greater)
    names = varied_settings(runs)
    figure, axes = pyplot.subplots(1, 2 if names else 1, figsize=(13 if names else 7, 4.5), squeeze=False)
    colors = mpl.colormaps["viridis"](_spread(len(ranked)))
    _curves(axes[0, 0], ranked, metric, names, colors)
    if names:
        _coordinates(axes[0, 1], ranked, metric, names, colors, greater=greater)
    figure.tight_layout()
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    pyplot.close(figure)


def _curves(axes: "Axes", ranked: list[ComparedRun], metric: str, names: list[str], colors: object) -> None:
    """One curve per run of the metric by step, at most MAX_CURVES of them."""
    for run, color in list(zip(ranked, colors, strict=True))[:MAX_CURVES]:
        label = ", ".join(f"{name.rpartition('.')[2]}={run.settings.get(name, '')}" for name in names) or run.name
        axes.plot(run.steps, run.values, color=color, marker="." if len(run.steps) < 30 else None, label=label)
    more = f" (the best {MAX_CURVES} of {len(ranked)})" if len(ranked) > MAX_CURVES else ""
    axes.set(xlabel="step", ylabel=metric, title=f"{metric} by step{more}")
    axes.legend(fontsize=7)


def _coordinates(
    axes: "Axes", ranked: list[ComparedRun], metric: str, names: list[str], colors: object, *, greater: bool
) -> None:
    """Parallel coordinates: an axis for each setting, the last one for the metric, a line per run."""
    columns = [[run.settings.get(name, "") for run in ranked] for name in names]
    scales = [_scale(column) for column in columns]
    best = [run.best(greater=greater)[0] for run in ranked]
    low, high = min(best), max(best)
    heights = [(value - low) / ((high - low) or 1) for value in best]
    for n, color in list(enumerate(colors))[::-1]:  # the best on top
        heights_of_run = [scale[column[n]] for scale, column in zip(scales, columns, strict=True)]
        axes.plot(range(len(names) + 1), [*heights_of_run, heights[n]], color=color, linewidth=3 if n == 0 else 1.5)
    # labels: each setting's values, and the metric's extremes
    for x, scale in enumerate(scales):
        for value, height in scale.items():
            axes.annotate(value, (x, height), fontsize=8, xytext=(3, 3), textcoords="offset points")
    for value in {low, high}:
        point = (len(names), (value - low) / ((high - low) or 1))
        axes.annotate(f"{value:.4g}", point, fontsize=8, xytext=(3, 3), textcoords="offset points")
    axes.set_xticks(range(len(names) + 1), [*names, metric], fontsize=8)
    axes.set(yticks=[], ylim=(-0.05, 1.1), title="settings to the best value; thick: the winner")
    for x in range(len(names) + 1):
        axes.axvline(x, color="0.8", zorder=0)


def _scale(column: list[str]) -> dict[str, float]:
    """Height of each value of a setting, 0 to 1: numbers by size, before words in alphabetical order."""
    values = sorted(set(column), key=lambda v: (parse_number(v) is None, parse_number(v) or 0.0, v))
    return dict(zip(values, _spread(len(values)), strict=True))


def _spread(n: int) -> list[float]:
    """n heights from 0 to 1 at equal distances; one value is in the middle."""
    return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]


def main() -> None:
    """Entry point of compare.py: parse arguments, print the table, write the picture."""
    parser = argparse.ArgumentParser(prog="compare.py", description=DESCRIPTION)
    parser.add_argument(
        "folder", help="a multirun folder, or any folder with runs below it; or the name of a sweep or run"
    )
    parser.add_argument("--metric", default="val/loss", help="the metric that decides; eval/NAME is a task's first one")
    parser.add_argument(
        "--max", action="store_true", help="greater is better (known of accuracies, rewards and speeds)"
    )
    parser.add_argument(
        "--tag", action="append", default=[], help="only runs with this tag (tags=[...] of train.py); may be repeated"
    )
    parser.add_argument("--out", type=Path, help="the picture; default: FOLDER/compare.png")
    parser.add_argument("--no-picture", action="store_true", help="the table alone")
    parser.add_argument("--report", type=Path, help="the HTML report; default: FOLDER/compare.html")
    args = parser.parse_args()
    try:
        # lower is better, except for known metrics and with --max
        folder = find_folder(args.folder)
        args.metric = full_name(folder, args.metric)
        greater = args.max or greater_is_better(args.metric) is True
        # read, print the tables, draw
        runs = read_runs(folder, args.metric, args.tag)
        logged = [run for run in runs if run.values]
        lines = [*table(logged, args.metric, greater=greater), *table_notes(runs, args.metric), *evaluation_table(runs)]
        print(*lines, sep="\n", flush=True)
        if args.report or not args.no_picture:
            report = args.report or folder / "compare.html"
            write_report(
                logged, args.metric, report, title=str(folder), greater=greater, notes=table_notes(runs, args.metric)
            )
            print(f"report: {report}")
        if args.out is None and not args.no_picture and find_spec("matplotlib") is None:
            print(f"picture: none, it is drawn with matplotlib: {INSTALL}")
        elif not args.no_picture:
            out = args.out or folder / "compare.png"
            draw(logged, args.metric, out, greater=greater)
            print(f"picture: {out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)


def write_report(
    runs: list[ComparedRun], metric: str, path: Path, *, title: str, greater: bool, notes: list[str]
) -> None:
    """Write an HTML page with the ranking, the metric by step, parallel coordinates and the importance of options."""
    names = varied_settings(runs)
    ranked = []
    for run in sorted(runs, key=lambda run: run.best(greater=greater)[0], reverse=greater):
        value, step = run.best(greater=greater)
        own = run.folder / "report.html"
        link = quote(os.path.relpath(own, path.parent)) if own.is_file() else ""
        settings, tags = [run.settings.get(name, "") for name in names], ", ".join(sorted(run.tags))
        tasks, [cells] = evaluation_cells([run])
        interval = interval_words(*run.intervals[step]) if step in run.intervals else ""
        measured = {"evaluations": dict(zip(tasks, cells, strict=True)), "interval": interval}
        ranked.append(RankedRun(run.name, link, tags, settings, run.steps, run.values, value, step, **measured))
    text = compare_page(title, metric, names, ranked, notes)
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def find_folder(reference: str) -> Path:
    """The folder of a path, or of the name of a sweep or run; DataError if there is none."""
    path = Path(reference)
    folder = path if path.exists() else named_sweep(reference, "FOLDER") or named_run(reference, "FOLDER")
    if folder is None:
        raise DataError(f"{reference}: no such folder, nor a sweep or run of this name{nearest(reference)}")
    return folder
