"""Tables on disk that rows are written to once: found again by a name that says what they hold, and mapped into memory."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genai_pl.data.columns import Place, refuse
from genai_pl.data.documents import cache_folder
from genai_pl.errors import DataError
from genai_pl.files import write_atomic

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

FORMAT = 4  # of what is read from files: raise it when the same file gives other rows
ROWS, CHARACTERS = 1000, 1 << 26  # of a batch at most
TYPES = {"text": "string", "json": "string", "row": "int64", "label": "bool_", "number": "float64"}
EMPTY = {"text": 0, "json": 2}  # the length of an empty text: "" is two characters of JSON

Cells = Iterable[tuple[Place, Sequence[object]]]


def keep(name: str, kinds: Mapping[str, str], cells: Cells) -> "Dataset":
    """The table called `name`, with columns of these kinds; it is written from the cells of its rows if it is not there."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    path = cache_folder() / f"table-{name}.arrow"
    if not path.is_file():
        write_atomic(path, partial(_write, kinds=kinds, cells=cells))
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=name)


def _write(path: Path, *, kinds: Mapping[str, str], cells: Cells) -> None:
    import pyarrow as pa

    schema = pa.schema([(column, getattr(pa, TYPES[kind])()) for column, kind in kinds.items()])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for place, batch in _batches(cells):
            try:
                arrays = [
                    pa.array(column, field.type) for column, field in zip(zip(*batch, strict=True), schema, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema))
            except (pa.ArrowException, TypeError) as error:  # more than 2 GiB of text
                raise DataError(f"{place}: too long ({error})") from None


def _batches(cells: Cells) -> Iterator[tuple[Place, list[Sequence[object]]]]:
    """Rows of cells that fit into memory together, and the place of the last one."""
    batch, size, place = [], 0, None
    for place, row in cells:
        batch.append(row)
        size += sum(len(cell) for cell in row if isinstance(cell, str))
        if len(batch) == ROWS or size > CHARACTERS:
            yield place, batch
            batch, size = [], 0
    if batch:
        yield place, batch


def say_empty(table: "Dataset", kinds: Mapping[str, str], name: str) -> None:
    """Log how many texts of each column are empty, and which is the first."""
    import pyarrow.compute as pc

    for column, kind in kinds.items():
        if kind not in EMPTY or column == "tools":  # most conversations have none
            continue
        empty = pc.equal(pc.binary_length(table.with_format("arrow")[:][column]), EMPTY[kind])
        if count := pc.sum(empty).as_py():
            where = name, column, pc.index(empty, True).as_py() + 1
            log.info("data        %s of %s rows of %s have an empty %s, first row %s", count, len(table), *where)


def dumps(value: object, place: Place) -> str:
    """JSON of a text, messages or tools, as tables keep them."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        refuse(place, "half of a surrogate pair is no text")
    except (TypeError, RecursionError) as error:
        refuse(place, f"not JSON ({error})")
    return text
