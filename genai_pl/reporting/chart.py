"""Line charts as inline SVG: several series by step, on a linear or logarithmic axis, with a legend in words.

Colors and text come from the page's style sheet (`page.STYLE`), so that a chart follows its light and dark modes.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 440, 230  # of the view box; a chart is scaled to its column
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 10, 26  # margins of the plot
MAX_POINTS = 300  # of a series; more are averaged in groups of neighbours
WIDE_RANGE = 100.0  # a ratio of values above which positive values have a logarithmic axis
N_COLORS = 8


class Series(NamedTuple):
    """A named line. low, high: an interval around each value, or empty."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Axis(NamedTuple):
    """A scale from values to 0..1. ticks: values that are labelled."""

    least: float
    most: float
    logarithmic: bool
    ticks: list[float]

    def place(self, value: float) -> float:
        """Share of the axis below a value."""
        low, high, x = self.least, self.most, value
        if self.logarithmic:
            low, high, x = math.log(low), math.log(high), math.log(max(value, self.least))
        return (x - low) / ((high - low) or 1.0)


def line_chart(series: Sequence[Series], *, mark: float | None = None, unit: str = "step") -> str:
    """An SVG of all series; "" if none has a finite value.

    mark: a step with a vertical line, the best one. unit: of the horizontal axis.
    """
    drawn = [thin(clean) for s in series if (clean := _finite(s)).steps]
    if not drawn:
        return ""
    x_axis = linear_axis([x for s in drawn for x in s.steps], n=4, whole=True)
    y_axis = value_axis([y for s in drawn for y in (*s.values, *s.low, *s.high)])
    parts = [_grid(x_axis, y_axis, unit)]
    if mark is not None and x_axis.least <= mark <= x_axis.most:
        parts.append(
            f'<line class="mark" x1="{_x(x_axis, mark)}" x2="{_x(x_axis, mark)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
    for n, s in enumerate(drawn):
        parts.append(_line(s, x_axis, y_axis, f"c{n % N_COLORS}"))
    title = escape(", ".join(s.name for s in drawn))
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} by {escape(unit)}">'
        + "".join(parts)
        + "</svg>"
    )


def legend(series: Sequence[Series]) -> str:
    """Names of several series in their colors; "" for one, which the heading names."""
    drawn = [s for s in series if _finite(s).steps]
    if len(drawn) < 2:
        return ""
    items = [f'<li><span class="key c{n % N_COLORS}"></span>{escape(s.name)}</li>' for n, s in enumerate(drawn)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def value_axis(values: Sequence[float]) -> Axis:
    """An axis for values: logarithmic if all are positive and they span more than two orders of magnitude."""
    low, high = min(values), max(values)
    if low <= 0 or high / low < WIDE_RANGE:
        return linear_axis(values, n=4)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [10.0**e for e in exponents][:: max(1, len(exponents) // 5)]
    return Axis(low, high, True, [t for t in ticks if low <= t <= high])


def linear_axis(values: Sequence[float], *, n: int, whole: bool = False) -> Axis:
    """A linear axis with about n ticks at round numbers. whole: ticks are whole numbers.

    >>> linear_axis([0.0, 10.0], n=4).ticks
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    low, high = min(values), max(values)
    if low == high:
        spread = abs(low) * 0.05 or 0.5
        low, high = (low - 1, high + 1) if whole else (low - spread, high + spread)
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    ticks = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, False, ticks)


def thin(series: Series) -> Series:
    """The series with at most MAX_POINTS points: means of neighbours."""
    size = -(-len(series.steps) // MAX_POINTS)
    if size <= 1:
        return series

    def means(values: Sequence[float]) -> list[float]:
        groups = [values[i : i + size] for i in range(0, len(values), size)]
        return [sum(group) / len(group) for group in groups]

    return Series(series.name, *(means(values) for values in series[1:]))


def number(value: float) -> str:
    """A number in few characters.

    >>> number(12345678.0), number(0.00031), number(2.4356), number(250.0), number(0.0)
    ('12.3M', '3.1e-4', '2.436', '250', '0')
    """
    size = abs(value)
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if letter == 'k' else bound):.3g}{letter}"
    return f"{value:.4g}"


def _finite(series: Series) -> Series:
    """The series without values that are not finite."""
    keep = [n for n, value in enumerate(series.values) if math.isfinite(value)]
    return Series(series.name, *([column[n] for n in keep] if column else [] for column in series[1:]))


def _x(axis: Axis, value: float) -> str:
    return f"{LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT):.1f}"


def _y(axis: Axis, value: float) -> str:
    return f"{HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM):.1f}"


def _grid(x_axis: Axis, y_axis: Axis, unit: str) -> str:
    """Lines and labels of both axes; the last label of the horizontal one has the unit."""
    parts = []
    for tick in y_axis.ticks:
        y = _y(y_axis, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{float(y) + 4:.1f}">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    for tick in x_axis.ticks:
        x = _x(x_axis, tick)
        anchor = "end" if float(x) > WIDTH - 40 else "middle"
        label = f"{number(tick)} {unit}" if tick == x_axis.ticks[-1] else number(tick)
        parts.append(f'<text class="{anchor}" x="{x}" y="{HEIGHT - 8}">{escape(label)}</text>')
    return "".join(parts)


def _line(series: Series, x_axis: Axis, y_axis: Axis, color: str) -> str:
    """The line, its interval, and points where there are few."""
    points = [(_x(x_axis, x), _y(y_axis, y)) for x, y in zip(series.steps, series.values, strict=True)]
    parts = []
    if series.low:
        edge = [(_x(x_axis, x), _y(y_axis, y)) for x, y in zip(series.steps, series.low, strict=True)]
        edge += [(_x(x_axis, x), _y(y_axis, y)) for x, y in zip(series.steps, series.high, strict=True)][::-1]
        parts.append(f'<polygon class="band {color}" points="{" ".join(",".join(p) for p in edge)}"/>')
    parts.append(f'<polyline class="line {color}" points="{" ".join(",".join(p) for p in points)}"/>')
    if len(points) <= 30:
        for (x, y), step, value in zip(points, series.steps, series.values, strict=True):
            words = escape(f"{series.name} {value:.6g} at {step:g}")
            parts.append(f'<circle class="dot {color}" cx="{x}" cy="{y}" r="2.5"><title>{words}</title></circle>')
    return "".join(parts)
