"""Columns of the table that a run prints."""

from typing import NamedTuple


class Column(NamedTuple):
    """A metric, its heading, and the format of its values."""

    metric: str
    heading: str
    form: str
