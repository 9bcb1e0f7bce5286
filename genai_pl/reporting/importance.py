"""Importance of options: the share of a metric's variance over runs that an option's values explain.

This is eta squared of a one-way analysis of variance (Fisher 1925), and on a full grid the main effect of functional
ANOVA (Hutter et al. 2014): the variance of the means by value over the whole variance. Options that vary together share
an effect, which each of them is given.
"""

from collections.abc import Sequence
from statistics import fmean

MAX_VALUES = 6  # of an option; numbers with more are divided into as many groups of about equal size
FEWEST = 4  # runs of which an importance is worth showing


def importance(column: Sequence[str], metric: Sequence[float]) -> float | None:
    """Share of the variance, 0 to 1, that an option explains; None where there are too few runs or nothing varies.

    column: the option's value in each run. metric: finite values of the same runs.
    """
    groups: dict[object, list[float]] = {}
    for key, value in zip(grouped(column), metric, strict=True):
        groups.setdefault(key, []).append(value)
    mean = fmean(metric) if metric else 0.0
    whole = sum((value - mean) ** 2 for value in metric)
    if len(metric) < FEWEST or whole == 0 or not 1 < len(groups) < len(metric):
        return None
    between = sum(len(values) * (fmean(values) - mean) ** 2 for values in groups.values())
    return min(between / whole, 1.0)


def grouped(column: Sequence[str]) -> list[object]:
    """The values of an option as groups: as they are, or numbers with many values by their rank.

    >>> grouped(["1", "2", "3", "4", "5", "6", "7", "8"])
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    if len(set(column)) <= MAX_VALUES:
        return list(column)
    try:
        ordered = sorted(set(map(float, column)))
    except ValueError:
        return list(column)
    n = min(MAX_VALUES, max(2, len(column) // 2))
    return [ordered.index(float(value)) * n // len(ordered) for value in column]
