"""Odd rows: what a table holds that can be learned from, but hardly was meant; counted and said, and left as it is."""

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from genai_pl.data.assistant_spans import REASONING_KEYS

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

log = logging.getLogger(__name__)

MAY_BE_EMPTY = ("tools", "label")  # most conversations have no tools; a text may have none of several labels
EMPTY = {"text": 0, "json": 2}  # the length of an empty text: "" is two characters of JSON
BLANK_CONTENT = r'"content":\s*("(\s|\\[nrt])*"|null)'  # in the JSON of a message


def log_odd_rows(table: "Dataset", cell_kinds: Mapping[str, str], name: str) -> None:
    """Log how many rows have an empty text, an answer without content, or equal answers to compare, and the first such row.

    cell_kinds: the columns with their types. name: of the source. A row's number is that of the column `row`, if there is one.
    """
    import pyarrow.compute as pc

    columns = table.with_format("arrow")[:]
    found: dict[str, pa.ChunkedArray] = {}
    for column, kind in cell_kinds.items():
        if kind in EMPTY and column not in MAY_BE_EMPTY:
            found[f"have an empty {column}"] = pc.equal(pc.binary_length(columns[column]), EMPTY[kind])
        if kind == "json" and column not in MAY_BE_EMPTY:
            found[f"have an empty answer in {column}"] = _empty_answers(columns[column])
        if column == "answers":
            found["have equal chosen and rejected answers, which teach nothing"] = _equal_answers(columns[column])
    for what, rows in found.items():
        if count := pc.sum(rows).as_py():
            first = pc.index(rows, True).as_py()
            number = columns["row"][first].as_py() if "row" in columns.column_names else first + 1
            log.info("data        %s of %s rows of %s %s, first row %s", count, len(table), name, what, number)


def _empty_answers(cells: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Which cells are messages with a turn of the assistant that says and calls nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    candidates = pc.match_substring_regex(cells, BLANK_CONTENT)  # few: only these are parsed
    if not pc.any(candidates).as_py():
        return candidates
    chosen = zip(candidates.to_pylist(), cells, strict=True)
    return pa.chunked_array([[bool(is_candidate) and has_empty_answer(cell.as_py()) for is_candidate, cell in chosen]])


def _equal_answers(cells: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Which cells are a list of one answer twice: their JSON is `[A, A]`."""
    import pyarrow as pa

    def repeats(text: str) -> bool:
        half = (len(text) - len("[, ]")) // 2
        return text[1 : half + 1] == text[half + 3 : -1]

    return pa.chunked_array([[repeats(text) for text in chunk.to_pylist()] for chunk in cells.chunks])


def has_empty_answer(text: str) -> bool:
    """True for the JSON of messages, one of them an assistant's without content, calls and thoughts.

    >>> has_empty_answer('[{"role": "user", "content": ""}, {"role": "assistant", "content": " "}]')
    True
    >>> has_empty_answer('[{"role": "assistant", "content": null, "tool_calls": [{"function": {}}]}]')
    False
    """
    messages = json.loads(text)
    return isinstance(messages, list) and any(
        isinstance(message, dict)
        and message.get("role") == "assistant"
        and not str(message.get("content") or "").strip()
        and not any(message.get(key) for key in ("tool_calls", *REASONING_KEYS))
        for message in messages
    )
