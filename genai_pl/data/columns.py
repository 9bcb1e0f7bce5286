"""Cells: values of a column parsed into the type that a run needs, or a DataError that names file, row and column.

Nothing is guessed: a number in a column of texts stands for the characters by which the file writes it (1.50 stays
"1.50"), `null` is no text, `true` is no number. A silently coerced cell would be a training example that nobody wrote.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from genai_pl.errors import DataError

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
SHORT = 60  # characters of a value in an error


class WrittenNumber(float):
    """A number of a JSON file that keeps its spelling in `text`."""

    __slots__ = ("text",)

    def __new__(cls, text: str) -> "WrittenNumber":
        number = super().__new__(cls, text)
        number.text = text
        return number


class Place(NamedTuple):
    """A cell of a data set.

    name: the file, or the name on the hub. row: its number, counted from 1. column: its name, or None for the whole row.
    renamed: (name, name in the file) of the columns that `data.columns` renames; messages have the file's.
    """

    name: str
    row: int
    column: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()

    def at(self, column: str) -> "Place":
        """The cell of a column in the same row."""
        return Place(self.name, self.row, column, self.renamed)

    def __str__(self) -> str:
        column = dict(self.renamed).get(self.column, self.column)
        return f"{self.name}: row {self.row}" + ("" if column is None else f": column {column!r}")


def refuse(place: Place, why: str) -> NoReturn:
    """Raise a DataError about a place."""
    raise DataError(f"{place}: {why}")


def parse_text(value: object, place: Place) -> str:
    """The text of a cell; a number becomes the text by which the file writes it."""
    if not isinstance(value, str):
        value = _number_text(value, place)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            refuse(place, f"half of a surrogate pair is no text ({preview(value)})")
    return value


def _number_text(value: object, place: Place) -> str:
    """The spelling of a number; DataError for everything else that is no text."""
    if value is None:
        refuse(place, "missing (null): give it a text, or leave the row out")
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    hint = "" if isinstance(value, list | dict) else "; write it in quotes"
    refuse(place, f"{preview(value)} is {type_name(value)}, not text{hint}")


def parse_number(value: object, place: Place) -> float:
    """The finite number of a cell, which may be written as text."""
    if isinstance(value, str) and "_" not in value:
        try:
            value = float(value)
        except ValueError:
            refuse(place, f"{preview(value)} is not a number")
    if value is None:
        refuse(place, "missing (null) is not a number: give one, or leave the row out")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(place, f"{preview(value)} is not a number")
    return float(value)


def parse_degree(value: object, place: Place) -> float:
    """The degree from 0 to 1 of a cell: such a number, or true or false for 1 or 0, as values or as text."""
    known = LABELS.get(value.strip().lower()) if isinstance(value, str) else value
    if isinstance(known, bool):
        return float(known)
    try:
        number = parse_number(value, place)
    except DataError:
        number = math.nan
    if not 0 <= number <= 1:
        given = "missing (null)" if value is None else preview(value)
        refuse(place, f"{given} is no label: give a number from 0 to 1, or true or false")
    return number


def parse_label(value: object, place: Place) -> bool:
    """The truth value of a cell: true or false, 1 or 0, as values or as text."""
    if isinstance(value, str):
        label = LABELS.get(value.strip().lower())
    else:
        label = bool(value) if isinstance(value, int | float) and value in (0, 1) else None
    if label is None:
        refuse(place, f"{preview(value)} is no label: write true or false, 1 or 0")
    return label


def parse_list(value: object, place: Place, read: Callable[[object, Place], object]) -> list:
    """`read(entry, place)` for each entry of a list, which may be written as JSON."""
    value = parse_json(value, place) if isinstance(value, str) else value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refuse(place, f"{preview(value)} is not a list")
    return [read(entry, place) for entry in value]


def parse_json(text: str, place: Place) -> object:
    """The value of a text that is JSON."""
    try:
        return loads(text)
    except (ValueError, RecursionError):
        refuse(place, f"{preview(text)} is not JSON, as a list or an object in a text must be")


def loads(text: str) -> object:
    """The value of JSON text; numbers keep their spelling, and a key that occurs twice is a ValueError.

    >>> loads('{"a": 1.50}')["a"].text
    '1.50'
    """
    return _DECODER.decode(text)


def decode_at(text: str, start: int) -> tuple[object, int]:
    """The JSON value that begins at character `start`, and the position after it."""
    return _DECODER.raw_decode(text, start)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError for a key that occurs twice, of which json.loads would keep the last."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return value


_DECODER = json.JSONDecoder(parse_float=WrittenNumber, object_pairs_hook=_object)


def type_name(value: object) -> str:
    """The name of a value's type in the words of JSON and tables.

    >>> type_name(True), type_name(2.5), type_name([]), type_name({})
    ('a boolean', 'a number', 'a list', 'an object')
    """
    if isinstance(value, Mapping):
        return "an object"
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "text", bytes: "binary"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), type(value).__name__)


def preview(value: object) -> str:
    """The value in one short line, for messages.

    >>> preview("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    line = value.text if isinstance(value, WrittenNumber) else ascii(value) if _has_surrogate(value) else repr(value)
    line = " ".join(line.split())
    return line if len(line) <= SHORT else f"{line[: SHORT - 1]}..."


def _has_surrogate(value: object) -> bool:
    """Whether the value holds half of a surrogate pair, which cannot be printed."""
    return any("\ud800" <= letter <= "\udfff" for letter in str(value))


def drop_missing_keys(value: object) -> object:
    """The value without keys that hold None.

    A parquet column of structs has one type, which holds the keys of all rows; in a row they were not given they are null.
    """
    if isinstance(value, Mapping):
        return {key: drop_missing_keys(inner) for key, inner in value.items() if inner is not None}
    return [drop_missing_keys(inner) for inner in value] if isinstance(value, list) else value
