"""Records: each row of a csv, JSON, parquet or text file as a mapping of its columns, with its place, as it is written.

The readers are our own because their errors name file, row and column, numbers keep their spelling, and nothing is
coerced: pandas and `datasets` turn 007 into 7, missing cells into NaN and mixed columns into text. Files are streamed
row by row; JSON lists and values over several lines are read whole.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from genai_pl.data.columns import Place, decode_at, drop_missing_keys, loads, preview, type_name
from genai_pl.errors import DataError
from genai_pl.object_storage import RemoteFile

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

File = Path | RemoteFile  # of this machine, or of object storage
Record = Mapping[str, object]
Records = Iterator[tuple[Place, Record]]
OnBytes = Callable[[float], object]  # receives how many more bytes have been read
SCHEMA_ROWS = 1000  # rows of JSON that are read for the names of its columns
BYTES = "utf-8-sig"  # UTF-8, with or without a byte order mark
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
PIECE = 1 << 24  # characters of a text that are read at once
SPACE = re.compile(r"\s*")
BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def no_report(_: float) -> None:
    """Nothing: for readers whose progress nobody follows."""


def read_records(
    files: Sequence[File],
    *,
    columns: Collection[str] | None = None,
    by_line: bool = False,
    on_bytes: OnBytes = no_report,
) -> Records:
    """The records of all files with their places, numbered from 1 in each file.

    columns: of a parquet file only these are read. by_line: a .txt gives one record per line instead of one per file.
    on_bytes: called with the bytes that were read; in all the sizes of the files. DataError names a file that cannot be read.
    """
    for path in files:
        name = str(path)
        try:
            for number, row in enumerate(_read_file(path, columns, by_line, on_bytes), start=1):
                yield Place(name, number), row
        except UnicodeDecodeError:
            raise DataError(why_undecodable(path)) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from None


def _read_file(path: File, columns: Collection[str] | None, by_line: bool, on_bytes: OnBytes) -> Iterator[Record]:
    """The records of a file, by its suffix."""
    kind_of_file = BUILDERS[path.suffix.lower()]
    if kind_of_file == "parquet":
        return parquet_rows(path, columns, on_bytes)
    if kind_of_file == "text":
        return text_lines(path, on_bytes) if by_line else text_rows(path, on_bytes)
    return csv_rows(path, on_bytes) if kind_of_file == "csv" else json_rows(path, on_bytes)


class _CountedFile(io.RawIOBase):
    """A file opened to be read, which reports the bytes of each read."""

    def __init__(self, path: File, on_bytes: OnBytes) -> None:
        super().__init__()
        self._raw = path.open_raw() if isinstance(path, RemoteFile) else io.FileIO(path)
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        n = self._raw.readinto(buffer)
        self._on_bytes(n)
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()


def _opened(path: File, on_bytes: OnBytes = no_report, newline: str | None = None) -> io.TextIOWrapper:
    """The file as text; `newline` as in `open`."""
    return io.TextIOWrapper(io.BufferedReader(_CountedFile(path, on_bytes)), encoding=BYTES, newline=newline)


def size_of(path: File) -> int:
    """Bytes of a file."""
    return path.size if isinstance(path, RemoteFile) else path.stat().st_size


def _whole_text(path: File) -> str:
    """The text of a file, without whitespace around it."""
    with _opened(path) as file:
        return file.read().strip()


def column_names(files: Sequence[File]) -> list[str]:
    """The columns of the first file that has rows; of JSON, those of its first rows."""
    for path in files:
        if path.suffix.lower() == ".parquet":
            names = parquet_file(path).schema_arrow.names
        else:
            records = islice(read_records([path], by_line=True), SCHEMA_ROWS)
            names = list(dict.fromkeys(name for _, record in records for name in record))
        if names:
            return names
    return []


def text_rows(path: File, on_bytes: OnBytes = no_report) -> Iterator[Record]:
    """The whole text as one record."""
    with _opened(path, on_bytes) as file:
        yield {"text": "".join(iter(partial(file.read, PIECE), ""))}


def text_lines(path: File, on_bytes: OnBytes = no_report) -> Iterator[Record]:
    """One record per line, which keeps its line break."""
    with _opened(path, on_bytes) as file:
        for line in file:
            yield {"text": line}


def csv_rows(path: File, on_bytes: OnBytes = no_report) -> Iterator[Record]:
    """One record per row, all cells texts; empty lines are skipped."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path, on_bytes, newline="") as file:
        # strict: a bare quote in a cell is an error, not a guess
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            if twice := next((name for n, name in enumerate(header) if name in header[:n]), None):
                raise DataError(f"{path}: the column {twice!r} is there twice")
            for number, cells in enumerate(filter(None, lines), start=1):
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}: row {number} (line {lines.line_num}): {len(cells)} cells, but {len(header)} columns"
                    )
                yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}: line {lines.line_num}: not csv ({error})") from None


def json_rows(path: File, on_bytes: OnBytes = no_report) -> Iterator[Record]:
    """The objects of a list, of lines, or one after the other; a string stands for an object with that `text`."""
    with _opened(path) as file:
        first = next((line for line in file if not line.isspace()), "")
    if first.lstrip().startswith("["):
        yield from _of_list(path, on_bytes)
    elif _is_json(first):
        yield from _of_lines(path, on_bytes)
    else:
        yield from _of_values(path, on_bytes)


def _is_json(line: str) -> bool:
    """Whether the line is a JSON value by itself."""
    try:
        loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _of_list(path: File, on_bytes: OnBytes) -> Iterator[Record]:
    """The records of one JSON list, which is decoded whole: each counts as an equal part of the file."""
    values, _ = _decoded(_whole_text(path), path, 0)
    size = size_of(path) / max(len(values), 1)
    for number, value in enumerate(values, start=1):
        on_bytes(size)
        yield _row(value, path, number)


def _of_lines(path: File, on_bytes: OnBytes) -> Iterator[Record]:
    """The records of JSON lines."""
    with _opened(path, on_bytes, newline="\n") as file:
        for number, line in enumerate((line for line in file if not line.isspace()), start=1):
            yield _row(_decoded(line, path, number)[0], path, number)


def _of_values(path: File, on_bytes: OnBytes) -> Iterator[Record]:
    """The records of JSON values that extend over lines, with whitespace between them."""
    text, number, end = _whole_text(path), 0, 0
    bytes_per_character = size_of(path) / max(len(text), 1)
    while end < len(text):
        number, start = number + 1, end
        value, end = _decoded(text, path, number, SPACE.match(text, end).end())
        on_bytes((end - start) * bytes_per_character)
        yield _row(value, path, number)


def _decoded(text: str, path: File, number: int, start: int | None = None) -> tuple[object, int]:
    """The JSON value that is the whole text, or the one that begins at `start`, and the position after it."""
    try:
        return (loads(text), len(text)) if start is None else decode_at(text, start)
    except RecursionError:
        reason = "nested too deeply"
    except json.JSONDecodeError as error:
        reason = f"{error.msg.removesuffix(' at')} at {preview(text[error.pos : error.pos + 40])}"
    except ValueError as error:
        reason = str(error).split(";")[0]
    raise DataError(f"{path}: cannot be read as json ({f'row {number}: ' if number else ''}{reason})")


def _row(value: object, path: File, number: int) -> Record:
    """A JSON value as a record; DataError if it is neither an object nor a string."""
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise DataError(f"{path}: row {number}: {type_name(value)}, not an object of columns")
    return value


def parquet_file(path: File) -> "ParquetFile":
    """The opened parquet file; DataError if it is none or has a column twice."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(io.BufferedReader(path.open_raw()) if isinstance(path, RemoteFile) else path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from None
    names = file.schema_arrow.names
    if twice := next((name for n, name in enumerate(names) if name in names[:n]), None):
        raise DataError(f"{path}: the column {twice!r} is there twice")
    return file


def parquet_rows(path: File, columns: Collection[str] | None, on_bytes: OnBytes = no_report) -> Iterator[Record]:
    """Records of Python values; a struct has only the keys that hold something."""
    import pyarrow as pa

    file = parquet_file(path)
    names = [name for name in file.schema_arrow.names if columns is None or name in columns]
    nested = {name for name in names if pa.types.is_nested(file.schema_arrow.field(name).type)}
    bytes_per_row = size_of(path) / max(file.metadata.num_rows, 1)
    try:
        for batch in file.iter_batches(batch_size=SCHEMA_ROWS, columns=names):
            on_bytes(batch.num_rows * bytes_per_row)
            for record in batch.to_pylist():
                yield {name: drop_missing_keys(value) if name in nested else value for name, value in record.items()}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def why_undecodable(path: File) -> str:
    """The reason why a file is not UTF-8: the first bad byte with its line, or the compression of the file."""
    contents = path.read_bytes()
    compression = next((name for mark, name in COMPRESSED.items() if contents.startswith(mark)), None)
    if compression:
        return f"{path}: packed by {compression}; unpack it first"
    try:
        contents.decode()
    except UnicodeDecodeError as error:
        line = contents[: error.start].count(b"\n") + 1
        return f"{path}: not UTF-8 at byte {error.start} (line {line}); convert it, for example with iconv"
    return f"{path}: not UTF-8"
