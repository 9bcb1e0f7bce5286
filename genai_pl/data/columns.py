"""Cells of a column as the type that a run needs: text as it is written, labels by value, numbers; else a DataError
that names file, row and column."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, NoReturn

from genai_pl.errors import DataError

LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
SHORT = 60  # characters of a value in an error


class WrittenNumber(float):
    """A number of a JSON file that remembers how it is written there."""

    __slots__ = ("text",)

    def __new__(cls, text: str) -> "WrittenNumber":
        number = super().__new__(cls, text)
        number.text = text
        return number


class Place(NamedTuple):
    """A cell: the file (or the name on the hub), the row counted from 1, and the column."""

    name: str
    row: int
    column: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: row {self.row}" + ("" if self.column is None else f": column {self.column!r}")


def refuse(place: Place, why: str) -> NoReturn:
    """A DataError about the place."""
    raise DataError(f"{place}: {why}")


def parse_text(value: object, place: Place) -> str:
    """The text of a cell; a number stands for the text by which the file writes it."""
    if not isinstance(value, str):
        value = _number_text(value, place)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            refuse(place, f"half of a surrogate pair is no text ({preview(value)})")
    return value


def _number_text(value: object, place: Place) -> str:
    if value is None:
        refuse(place, "missing (null): give it a text, or leave the row out")
    if isinstance(value, WrittenNumber):
        return value.text
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    refuse(place, f"{preview(value)} is {type_name(value)}, not text; write it in quotes")


def parse_number(value: object, place: Place) -> float:
    """The finite number of a cell, which may be written as text."""
    if isinstance(value, str) and "_" not in value:
        try:
            value = float(value)
        except ValueError:
            refuse(place, f"{preview(value)} is not a number")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(place, f"{preview(value)} is not a number")
    return float(value)


def parse_label(value: object, place: Place) -> bool:
    """Whether a cell says yes: true or false, 1 or 0, as values or as text."""
    if isinstance(value, str):
        found = LABELS.get(value.strip().lower())
    else:
        found = bool(value) if isinstance(value, int | float) and value in (0, 1) else None
    if found is None:
        refuse(place, f"{preview(value)} is no label: write true or false, 1 or 0")
    return found


def parse_list(value: object, place: Place, read: Callable[[object, Place], object]) -> list:
    """What `read` makes of each entry of a list, which may be written as JSON."""
    value = parse_json(value, place) if isinstance(value, str) else value
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refuse(place, f"{preview(value)} is not a list")
    return [read(entry, place) for entry in value]


def parse_json(text: str, place: Place) -> object:
    """The value that a text writes as JSON."""
    try:
        return loads(text)
    except (ValueError, RecursionError):
        refuse(place, f"{preview(text)} is not JSON, as a list of objects in a text must be")


def loads(text: str) -> object:
    """The value of JSON text; numbers know how they are written, a key that comes twice is a ValueError.

    >>> loads('{"a": 1.50}')["a"].text
    '1.50'
    """
    return _DECODER.decode(text)


def decode_at(text: str, start: int) -> tuple[object, int]:
    """The value of the JSON that begins there, and where it ends."""
    return _DECODER.raw_decode(text, start)


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice")
    return found


_DECODER = json.JSONDecoder(parse_float=WrittenNumber, object_pairs_hook=_object)


def type_name(value: object) -> str:
    """The name of a value's type, as JSON and tables call it.

    >>> type_name(True), type_name(2.5), type_name([]), type_name({})
    ('a boolean', 'a number', 'a list', 'an object')
    """
    if isinstance(value, Mapping):
        return "an object"
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "text", bytes: "binary"}
    return next((name for found, name in names.items() if isinstance(value, found)), type(value).__name__)


def preview(value: object) -> str:
    """The value in one short line.

    >>> preview("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa..."
    """
    shown = value.text if isinstance(value, WrittenNumber) else ascii(value) if _has_surrogate(value) else repr(value)
    shown = " ".join(shown.split())
    return shown if len(shown) <= SHORT else f"{shown[: SHORT - 1]}..."


def _has_surrogate(value: object) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in str(value))


def drop_missing_keys(value: object) -> object:
    """A value of a table without the keys that were not in its rows: one type of struct holds the keys of all of them."""
    if isinstance(value, Mapping):
        return {key: drop_missing_keys(inner) for key, inner in value.items() if inner is not None}
    return [drop_missing_keys(inner) for inner in value] if isinstance(value, list) else value
