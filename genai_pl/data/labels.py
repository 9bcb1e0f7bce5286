"""Label cells: names, numbers or lists of them, and the labels that all cells of a column make together.

What a column holds decides what is learned, unless options say it: texts and whole numbers are classes, numbers with a
fraction are values to predict (regression), lists of names are several labels of one text.
"""

from collections.abc import Iterable, Sequence

from genai_pl.config.labels import MULTI, PROBLEM_TYPES, REGRESSION, SINGLE, Labels
from genai_pl.data.columns import (
    Place,
    parse_degree,
    parse_json,
    parse_list,
    parse_text,
    preview,
    refuse,
    type_name,
)
from genai_pl.data.records import Record
from genai_pl.errors import ConfigError, DataError

Scalar = str | int | float
Cell = Scalar | list[Scalar]
MAX_LABELS = 10_000  # more names than any classifier has: the column holds something else


def parse_label_cell(value: object, place: Place) -> Cell:
    """A text, a number, or a list of them; true and false are the names `true` and `false`; lists may be written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, place)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_scalar(entry, place) for entry in value]
    return _scalar(value, place)


def _scalar(value: object, place: Place) -> Scalar:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not value.strip():
        refuse(place, "an empty label: name it, or leave the row out")
    if not isinstance(value, str | int | float) or value != value:
        refuse(place, f"{preview(value)} is {type_name(value)}, and a label is a text, a number or a list of them")
    return value if isinstance(value, str | int) else float(value)


def find_labels(
    cells: Iterable[Cell], *, names: Sequence[str] | None, problem_type: str | None, known: Labels | None
) -> Labels:
    """The labels of a column, in order: given names, those of a head that covers the column, else those found, sorted.

    names: of the option data.labels. problem_type: of the option of that name; None: by the cells. known: the labels of the
    model's head, if it has one. Whole numbers are sorted as numbers.
    """
    cells = list(cells)
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ConfigError(f"data.problem_type={problem_type} is not one of {', '.join(PROBLEM_TYPES)}")
    kind = problem_type or _problem_of(cells)
    if kind == REGRESSION:
        sizes = {len(cell) if isinstance(cell, list) else 1 for cell in cells}
        if len(sizes) > 1:
            raise DataError(f"data.label: rows have {min(sizes)} to {max(sizes)} numbers; give each as many")
        n = sizes.pop()
        found = ("value",) if n == 1 else tuple(f"value_{i}" for i in range(n))
        fitting = next((given for given in (names, known and known.names) if given and len(given) == n), None)
        if names and fitting is None:
            raise ConfigError(f"data.labels has {len(names)} names for {n} numbers in a row")
        return Labels(tuple(fitting or found), REGRESSION)
    values = {entry for cell in cells for entry in (cell if isinstance(cell, list) else [cell])}
    if len(values) > MAX_LABELS:
        raise DataError(f"data.label: {len(values):,} different labels; is this the column of labels?")
    if names:
        labels = tuple(map(str, names))
    elif known is not None and all(label_index(known, value) is not None for value in values):
        labels = known.names
    else:
        labels = tuple(sorted({str(value) for value in values}, key=_order(values)))
    _check_names(labels, kind)
    return Labels(labels, kind)


def _check_names(names: Sequence[str], problem_type: str) -> None:
    """ConfigError for a name that occurs twice, DataError for one class, of which every text is."""
    if repeated := [name for n, name in enumerate(names) if name in names[:n]]:
        raise ConfigError(f"data.labels names {preview(repeated[0])} twice: give each output a name of its own")
    if problem_type == SINGLE and len(names) < 2:
        only = f"only the label {preview(names[0])}" if names else "no labels"
        raise DataError(
            f"the data have {only}, and one class is nothing to learn: add rows of another, or set data.labels"
        )


def label_index(labels: Labels, value: Scalar) -> int | None:
    """The position of a cell's label: that of its name, or the number itself where no label is called so; None without one.

    >>> label_index(Labels(("bad", "good")), "good"), label_index(Labels(("bad", "good")), 1), label_index(Labels(("1", "2")), 1)
    (1, 1, 0)
    """
    if str(value) in labels.names:
        return labels.names.index(str(value))
    number = int(value) if _is_whole(value) else -1
    return number if 0 <= number < len(labels.names) and not any(map(_is_whole, labels.names)) else None


def encode_label(labels: Labels, cell: Cell) -> list[float]:
    """The target of a row: the index of its class; 0 or 1 for every label; or its numbers. DataError for an unknown label."""
    if labels.problem_type == REGRESSION:
        try:
            return [float(entry) for entry in (cell if isinstance(cell, list) else [cell])]
        except ValueError:
            raise DataError(f"data.label: {preview(cell)} is not a number (data.problem_type=regression)") from None
    entries = cell if isinstance(cell, list) else [cell]
    indices = [label_index(labels, entry) for entry in entries]
    if None in indices:
        named = ", ".join(labels.names[:10]) + (", ..." if len(labels.names) > 10 else "")
        raise DataError(f"data.label: {preview(entries[indices.index(None)])} is not one of the labels {named}")
    if labels.problem_type == MULTI:
        return [float(n in indices) for n in range(len(labels.names))]
    if len(indices) != 1:
        raise DataError(
            f"data.label: {preview(cell)} is {len(indices)} labels, and each text has one; "
            "data.problem_type=multi_label_classification allows several"
        )
    return [float(indices[0])]


def parse_ranking(record: Record, columns: Sequence[str], place: Place) -> tuple[str, list[str], list[float]]:
    """Query, documents and their relevance of a record; columns: the three names. DataError for lists of unequal length."""
    query, document, label = (record.get(column) for column in columns)
    places = [place.at(column) for column in columns]
    is_list = (isinstance(document, str) and document.lstrip().startswith("[")) or (
        isinstance(document, Sequence) and not isinstance(document, str)
    )
    if is_list:
        documents, labels = parse_list(document, places[1], parse_text), parse_list(label, places[2], parse_degree)
    else:
        documents, labels = [parse_text(document, places[1])], [parse_degree(label, places[2])]
    if not documents or len(documents) != len(labels):
        refuse(places[2], f"{len(labels)} numbers for {len(documents)} documents: give each document its relevance")
    return parse_text(query, places[0]), documents, labels


def _problem_of(cells: Sequence[Cell]) -> str:
    """The problem type that the cells suggest; DataError where lists and single values are mixed."""
    n_lists = sum(isinstance(cell, list) for cell in cells)
    if n_lists not in (0, len(cells)):
        raise DataError(
            f"data.label: {n_lists} of {len(cells)} rows have lists, the others single labels; write all the same way, "
            "or set data.problem_type"
        )
    values = [entry for cell in cells for entry in (cell if isinstance(cell, list) else [cell])]
    if values and all(map(_is_number, values)) and not all(map(_is_whole, values)):
        return REGRESSION
    return MULTI if n_lists else SINGLE


def _is_whole(value: Scalar) -> bool:
    """True for 3 and for the text "3" of a csv file."""
    return isinstance(value, int) or (isinstance(value, str) and value.strip().removeprefix("-").isdecimal())


def _is_number(value: Scalar) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return not (isinstance(value, str) and "_" in value)


def _order(values: Iterable[Scalar]):
    """The sort key of names: numbers by value where all are numbers, else texts by spelling."""
    return float if all(map(_is_number, values)) else str
