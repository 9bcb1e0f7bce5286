"""Table cache: tables written once to disk, found again by a name made of their contents, checked, and memory-mapped.

Tables are Arrow streams with a checksum footer. Mapping one takes no memory and no time, and processes of one machine
share its pages. A cache that is damaged is written again with a warning; one is never read partially.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from genai_pl.data import checksummed
from genai_pl.data.columns import Place, refuse
from genai_pl.data.worker_pool import map_in_order
from genai_pl.errors import DataError
from genai_pl.progress import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

FORMAT = 8  # version of read tables: raise it when the same file gives other rows
ROWS, CHARACTERS = 1000, 1 << 26  # limits of a batch that is written at once
TYPES = {"text": "string", "json": "string", "row": "int64", "label": "bool_", "number": "float64"}

_ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one for each cell
Cells = Iterable[tuple[Place, Sequence[object]]]  # for each row, its place and its cells


def cached_table(name: str, cell_kinds: Mapping[str, str], cells: Cells) -> "Dataset":
    """The table called `name`, written from `cells` unless it exists.

    cell_kinds: the columns, with the type of each by TYPES. cells: consumed only if the table has to be written.
    """
    return memory_mapped_table(
        f"table-{name}", partial(_write_table, cell_kinds=cell_kinds, cells=cells), fingerprint=name
    )


def cached_encoding(
    kind: str,
    name: str,
    table: "Dataset",
    encode: Callable[..., dict[str, list]],
    *,
    batch_size: int,
    processes: int = 0,
    **options: object,
) -> "Dataset":
    """The table that `encode` makes of batches of `table`, cached as `kind`-`name`.

    name: a hash of everything that the result depends on. batch_size: rows of a call. processes: that encode, 0: this one;
    the table does not depend on their number. options: passed to `encode`.
    """
    if not len(table):
        return table
    how = {"encode": partial(encode, **options), "batch_size": batch_size, "processes": processes}
    write = partial(_write_encoded, table=table, **how)
    return memory_mapped_table(f"{kind}-{name}", write, fingerprint=name)


def memory_mapped_table(name: str, write: Callable[[Path], object], *, fingerprint: str) -> "Dataset":
    """The table of a cache file, which `write` writes if it does not exist or is damaged."""
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    path = cache_folder() / f"{name}.arrow"
    checksummed.ensure(path, write)
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=fingerprint)


def cache_folder() -> Path:
    """The folder of the tables, beside the cache of `datasets`; created if needed."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "genai_pl"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_encoded(
    path: Path, *, table: "Dataset", encode: Callable[[dict], dict[str, list]], batch_size: int, processes: int
) -> None:
    """Write the encoded batches of a table, with a progress bar on a terminal."""
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(path)) as writer, progress_bar(len(table), "tokenizing") as bar:
        for encoded in map_in_order(encode, table.iter(batch_size), processes):
            writer.write_batch(encoded)
            bar.update(min(batch_size, len(table) - bar.n))
        writer.finalize()


def _write_table(path: Path, *, cell_kinds: Mapping[str, str], cells: Cells) -> None:
    """Write rows of cells as an Arrow stream, batch by batch."""
    import pyarrow as pa

    schema = pa.schema([(column, getattr(pa, TYPES[kind])()) for column, kind in cell_kinds.items()])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for place, batch in _batches(cells):
            try:
                arrays = [
                    pa.array(column, field.type) for column, field in zip(zip(*batch, strict=True), schema, strict=True)
                ]
                writer.write_batch(pa.record_batch(arrays, schema))
            except (pa.ArrowException, TypeError) as error:  # an arrow column holds at most 2 GiB of text
                raise DataError(f"{place}: too long ({error})") from None


def _batches(cells: Cells) -> Iterator[tuple[Place, list[Sequence[object]]]]:
    """Rows of cells in batches that fit into memory, each with the place of its last row."""
    batch, size, place = [], 0, None
    for place, row in cells:
        batch.append(row)
        size += sum(len(cell) for cell in row if isinstance(cell, str))
        if len(batch) == ROWS or size > CHARACTERS:
            yield place, batch
            batch, size = [], 0
    if batch:
        yield place, batch


def to_json(value: object, place: Place) -> str:
    """JSON of a text, messages or tools; DataError for what UTF-8 or JSON cannot hold."""
    if not value and type(value) is list:  # the tools of nearly every row
        return "[]"
    try:
        text = _ENCODER.encode(value)
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        refuse(place, "half of a surrogate pair is no text")
    except (TypeError, RecursionError) as error:
        refuse(place, f"not JSON ({error})")
    return text
