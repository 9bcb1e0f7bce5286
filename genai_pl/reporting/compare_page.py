"""The report of several runs: a ranking, the metric by step, parallel coordinates and the importance of options."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from genai_pl.reporting import page
from genai_pl.reporting.chart import N_COLORS, Series, legend, line_chart, number
from genai_pl.reporting.importance import FEWEST, importance

MAX_CURVES = 8  # in one chart: as many as there are colors
WIDTH, HEIGHT, SIDE, TOP, BOTTOM = 900, 300, 70, 34, 16  # of parallel coordinates
CHARACTER = 6.8  # width of one in a picture, about


class RankedRun(NamedTuple):
    """A run in its place of the ranking.

    name: of the folder. link: to its own report, relative; "" without one. tags: labels. settings: values of the options
    that differ, in order. steps, values: the metric. best, step: its best value. evaluations: metric of benchmarks to its
    last value in words. interval: of the best value, in words.
    """

    name: str
    link: str
    tags: str
    settings: Sequence[str]
    steps: Sequence[int]
    values: Sequence[float]
    best: float
    step: int
    evaluations: Mapping[str, str] = {}
    interval: str = ""


def compare_page(
    title: str, metric: str, options: Sequence[str], runs: Sequence[RankedRun], notes: Sequence[str]
) -> str:
    """The HTML file. options: names of those that differ. runs: the best first. notes: lines below the ranking."""
    words = [escape(note.removeprefix("note: ")) for note in notes]
    return page.page(
        f"{title}: {metric}",
        [
            f'<h1>{escape(title)}</h1><p class="soft">{len(runs)} runs by {escape(metric)}, the best first</p>',
            page.figures(_figures(metric, options, runs)),
            page.section("Ranking", _ranking(metric, options, runs), *(f'<p class="soft">{w}</p>' for w in words)),
            page.section("Benchmarks at the end", _evaluations(runs)),
            page.section("Curves", _curves(metric, options, runs)),
            page.section("Settings and the best value", coordinates(metric, options, runs)),
            page.section("Importance of options", _importances(metric, options, runs)),
        ],
    )


def _figures(metric: str, options: Sequence[str], runs: Sequence[RankedRun]) -> dict[str, str]:
    """The winner in large numbers."""
    best = runs[0]
    found = {f"best {metric}": number(best.best), "at step": f"{best.step:,}", "in run": best.name}
    return found | {name: value or "default" for name, value in list(zip(options, best.settings, strict=True))[:5]}


def _ranking(metric: str, options: Sequence[str], runs: Sequence[RankedRun]) -> str:
    """The table, with a link to each run's own report."""
    has_tags = any(run.tags for run in runs)
    heads = ["run", *(["tags"] if has_tags else []), *options, f"best {metric}", "at step", "last"]
    rows = []
    for run in runs:
        figures = (number(run.best) + run.interval, f"{run.step:,}", number(run.values[-1]))
        rows.append([run.name, *([run.tags] if has_tags else []), *run.settings, *figures])
    return page.table(heads, rows, numbers=len(heads) - 3, best=0, links=[run.link for run in runs])


def _evaluations(runs: Sequence[RankedRun]) -> str:
    """The last values of benchmarks, with intervals; "" without benchmarks."""
    names = list(dict.fromkeys(name for run in runs for name in run.evaluations))
    if not names:
        return ""
    return page.table(("run", *names), [[run.name, *(run.evaluations.get(name, "") for name in names)] for run in runs])


def _label(options: Sequence[str], run: RankedRun) -> str:
    """What tells a run from the others, in few words."""
    pairs = zip(options, run.settings, strict=True)
    return ", ".join(f"{name.rpartition('.')[2]}={value or 'default'}" for name, value in pairs) or run.name


def _curves(metric: str, options: Sequence[str], runs: Sequence[RankedRun]) -> str:
    """The metric by step of the best runs."""
    series = [Series(_label(options, run), run.steps, run.values) for run in runs[:MAX_CURVES]]
    note = f"the best {MAX_CURVES} of {len(runs)}" if len(runs) > MAX_CURVES else ""
    below = legend(series) or f'<p class="soft">{escape(series[0].name)}</p>'
    return f'<div style="max-width: 760px">{page.card(metric, line_chart(series), note=note, below=below)}</div>'


def coordinates(metric: str, options: Sequence[str], runs: Sequence[RankedRun]) -> str:
    """Parallel coordinates as SVG: an axis for each option, the last one for the metric, a line for each run; "" where
    nothing differs.
    """
    if not options:
        return ""
    scales = [_scale([run.settings[n] for run in runs]) for n in range(len(options))]
    low, high = min(run.best for run in runs), max(run.best for run in runs)
    gap = (WIDTH - 2 * SIDE) / len(options)
    room = max(6, min(26, int(gap / CHARACTER)))  # characters between two axes
    parts = []
    # lines, the best on top
    for n, run in list(enumerate(runs))[::-1]:
        heights = [scale[value] for scale, value in zip(scales, run.settings, strict=True)]
        heights.append((run.best - low) / ((high - low) or 1))
        points = " ".join(f"{SIDE + i * gap:.1f},{_place(height):.1f}" for i, height in enumerate(heights))
        kind = "c1" if n == 0 else "c0 faint"
        width = ' style="stroke-width: 3"' if n == 0 else ""
        words = escape(f"{run.name}: {_label(options, run)}, {metric} {run.best:.6g}")
        parts.append(f'<polyline class="line {kind}"{width} points="{points}"><title>{words}</title></polyline>')
    # axes with their names and values
    labels = [
        *((name, [(v or "default", h) for v, h in scale.items()]) for name, scale in zip(options, scales, strict=True))
    ]
    labels.append((metric, [(number(low), 0.0), *([(number(high), 1.0)] if high > low else [])]))
    for i, (name, values) in enumerate(labels):
        x = SIDE + i * gap
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="middle strong" x="{x:.1f}" y="16">{escape(_short(name, room))}</text>')
        shown = values if len(values) <= 8 else [values[0], values[-1]]
        for text, height in shown:
            parts.append(
                f'<text x="{x + 5:.1f}" y="{_place(height) + 4:.1f}">{escape(_short(text, min(room, 18)))}</text>'
            )
    name = escape(f"settings and best {metric} of {len(runs)} runs")
    svg = f'<svg class="halo" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    words = '<p class="soft">One line for each run; the thick one is the best.</p>'
    return f'<div class="card"><div class="wide">{svg}</div>{words}</div>'


def _importances(metric: str, options: Sequence[str], runs: Sequence[RankedRun]) -> str:
    """Bars of the share of variance that each option explains; a line where there are too few runs."""
    if not options:
        return ""
    found = {
        name: share
        for n, name in enumerate(options)
        if (share := importance([run.settings[n] for run in runs], [run.best for run in runs])) is not None
    }
    if not found:
        return f'<p class="soft">none: it takes at least {FEWEST} runs, and values that several of them share</p>'
    rows = sorted(found.items(), key=lambda item: -item[1])
    bars = []
    for n, (name, share) in enumerate(rows):
        y = 8 + 26 * n
        bars.append(f'<text class="end strong" x="190" y="{y + 14}">{escape(_short(name, 30))}</text>')
        bars.append(
            f'<rect class="bar c{n % N_COLORS}" x="200" y="{y}" width="{max(share * 190, 1):.1f}" height="18" rx="3"/>'
        )
        bars.append(f'<text x="{206 + share * 190:.1f}" y="{y + 14}">{share:.0%}</text>')
    svg = f'<svg viewBox="0 0 440 {16 + 26 * len(rows)}" role="img" aria-label="importance">{"".join(bars)}</svg>'
    words = (
        f"Share of the variance of the best {escape(metric)} over the runs that the values of an option explain (eta squared; "
        "numbers with many values in groups). Options that vary together share an effect."
    )
    return f'<div class="card" style="max-width: 640px">{svg}<p class="soft">{words}</p></div>'


def _scale(column: Sequence[str]) -> dict[str, float]:
    """Height of each value of an option, 0 to 1: numbers by size, before words."""
    values = sorted(set(column), key=_order)
    return {value: 0.5 if len(values) == 1 else i / (len(values) - 1) for i, value in enumerate(values)}


def _order(value: str) -> tuple[int, float, str]:
    try:
        return (0, float(value), "")
    except ValueError:
        return (1, 0.0, value)


def _place(height: float) -> float:
    return HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM)


def _short(text: str, most: int) -> str:
    """The text, or its end: the last part of an option's name tells most.

    >>> _short("callbacks.samples.max_new_tokens", 20), _short("callbacks.samples.max_new_tokens", 8)
    ('max_new_tokens', '..tokens')
    """
    last = text.rpartition(".")[2]
    shown = text if len(text) <= most or last.isdigit() else last
    return shown if len(shown) <= most else f"..{shown[-(most - 2) :]}"
