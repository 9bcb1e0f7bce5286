"""Columns of the table that a run prints: a metric, its heading and its format."""

from typing import NamedTuple


class Column(NamedTuple):
    """One column of the printed table.

    metric: name of the metric as it is logged, such as train/loss
    heading: text above the column
    form: format of a value, which fixes the width of the column
    """

    metric: str
    heading: str
    form: str
