"""Sources: files, folders, globs, shipped sets and hub names, read into tables of documents or streamed.

A path names a source as follows, first match first: an address of object storage (s3://...), a file there, a folder or a
glob; a file; a folder (all files of known suffixes below it); a glob; a set that is shipped in `corpus/`; a name on the hub,
owner/name. A table that is read from files is cached under a name
made of the files' contents (`cache_name`), so an edited file is read again and an unchanged one never.
"""

import glob
import hashlib
import logging
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.data import checksummed, records
from genai_pl.data.columns import Place, drop_missing_keys, parse_text
from genai_pl.data.odd_rows import log_odd_rows
from genai_pl.data.records import BUILDERS, File, Records, first_line, size_of
from genai_pl.data.table_store import FORMAT, Cells, cached_table
from genai_pl.errors import DataError, reason_of
from genai_pl.imports import collecting_later
from genai_pl.object_storage import RemoteFile, find_files, is_remote
from genai_pl.progress import BYTES, progress_bar

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Source:
    """Where documents are read from: files of one kind, here or in object storage, or a name on the hub.

    name: as the user gave it. files: empty for a name on the hub. split: of a data set on the hub.
    columns: (name, name in the files) of columns that are read under another name.
    """

    name: str
    files: tuple[File, ...] = ()
    split: str = "train"
    columns: tuple[tuple[str, str], ...] = ()

    @cached_property
    def content(self) -> str:
        """`content_hash` at its first use: everything derived from this source has one name, even if a file changes."""
        return content_hash(self)

    @property
    def is_text(self) -> bool:
        """Whether its files are plain text, without columns."""
        return bool(self.files) and BUILDERS[self.files[0].suffix.lower()] == "text"


def find_source(path: str, *, option: str = "data.path", columns: Mapping[str, str] | None = None) -> Source:
    """The source that a path stands for; DataError if there is none. `option` is the option's name, for the error.

    columns: names under which columns of the files are read, {name: name in the files} (`data.columns`).
    """
    source = _found(os.path.expanduser(path), option)
    if not columns:
        return source
    renamed = replace(source, columns=tuple(sorted(columns.items())))
    in_files = column_names(source)
    for name, column in renamed.columns:
        if column not in in_files:
            listed = ", ".join(in_files)
            raise DataError(f"{option}={path}: data.columns.{name}={column}: no such column; found: {listed}")
    return renamed


def _found(path: str, option: str) -> Source:
    """The source of a path, its columns as they are called."""
    # files of object storage
    if is_remote(path):
        there = find_files(path, option)
        known = [file for file in there if file.suffix.lower() in BUILDERS]
        return _source_of_files(path, known or there, option)
    # local files: one, all of a folder, or those of a glob
    if Path(path).is_file():
        files = [Path(path)]
    elif Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in BUILDERS and p.is_file())
        if not files:
            raise DataError(f"{option}={path}: no {', '.join(BUILDERS)} file in this folder")
    else:
        files = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
    if files:
        return _source_of_files(path, files, option)
    # no local file: a shipped set, then a name on the hub
    if (CORPUS / path).is_dir():
        return _source_of_files(path, [next((CORPUS / path).glob("train.*"))], option)
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).suffix:
        return Source(path)
    shipped = ", ".join(sorted(p.name for p in CORPUS.iterdir() if p.is_dir()))
    raise DataError(
        f"{option}={path}: no such file or folder (shipped sets: {shipped}; hub names look like owner/name)"
    )


def shipped_validation(path: str) -> Source | None:
    """The validation file of a shipped set; None for any other path."""
    if Path(path).expanduser().exists() or not (CORPUS / path).is_dir():
        return None
    return _source_of_files(path, list((CORPUS / path).glob("val.*")), "data.path")


def _source_of_files(path: str, files: Sequence[File], option: str) -> Source:
    """A source of files of one known kind; DataError for others, for a mixture, and for empty ones."""
    unknown = [p for p in files if p.suffix.lower() not in BUILDERS]
    if unknown:
        raise DataError(f"{option}={unknown[0]}: unknown kind of file; known: {', '.join(BUILDERS)}")
    kinds = {BUILDERS[p.suffix.lower()] for p in files}
    if len(kinds) > 1:
        raise DataError(f"{option}={path}: files of several kinds ({', '.join(sorted(kinds))}); name one with a glob")
    if all(size_of(p) == 0 for p in files):
        raise DataError(f"{option}={path}: empty")
    return Source(path, tuple(files))


def read_documents(source: Source, column: str, *, streaming: bool = False) -> "Dataset | IterableDataset":
    """The documents of a source, in a column `text`.

    A .txt file is one document; streamed, each of its lines is a record. A stream reads files or the hub as it is iterated.
    """
    configure_progress_bars()
    if not source.files:
        return _hub_documents(source, column, streaming=streaming)
    check_columns(source, column_names(source), {"data.column": column})
    if streaming:
        from datasets import Features, IterableDataset, Value

        options = {"files": list(source.files), "column": column}
        return IterableDataset.from_generator(_stream_texts, Features({"text": Value("string")}), gen_kwargs=options)
    cells = ((place, [parse_text(row.get(column), place.at(column))]) for place, row in read_records(source, [column]))
    table = cached_table(cache_name(source, column), {"text": "text"}, verify_unchanged(source, cells))
    return _check_documents(source, table)


def cache_name(source: Source, *options: object) -> str:
    """A hash of a source's contents and the options under which it is read: the name of its cached table."""
    parts = f"{FORMAT}/{source.content}/{options}"
    return hashlib.blake2b(parts.encode(), digest_size=8).hexdigest()


def verify_unchanged(source: Source, cells: Cells) -> Cells:
    """The cells, passed through; after the last one a DataError if the files changed while they were read.

    The table would otherwise be cached under the hash of contents that it does not have.
    """
    before = source.content
    yield from cells
    if content_hash(source) != before:
        raise DataError(f"data.path={source.name}: it has changed while it was read; start again")


def _stream_texts(files: list[File], column: str) -> Iterator[dict[str, str]]:
    """Generator of {"text"} for a streamed data set; a top-level function, because `datasets` pickles it."""
    for place, row in records.read_records(files, columns=[column], by_line=True):
        yield {"text": parse_text(row.get(column), place.at(column))}


def _hub_documents(source: Source, column: str, *, streaming: bool) -> "Dataset | IterableDataset":
    """Documents of a data set on the hub, converted to text where the column is not text already."""
    from datasets import Value

    table = load_hub(source, streaming=streaming)
    check_columns(source, table.column_names or list(next(iter(table), {})), {"data.column": column})
    table = table.select_columns([column])
    if streaming:
        return table if column == "text" else table.rename_column(column, "text")
    if table.features[column] != Value("string") or table.data.column(column).null_count:
        cells = ((place, [parse_text(row.get(column), place.at(column))]) for place, row in _hub_rows(source, table))
        return _check_documents(source, cached_table(f"{table._fingerprint}-{FORMAT}", {"text": "text"}, cells))
    return _check_documents(source, table if column == "text" else table.rename_column(column, "text"))


def _check_documents(source: Source, table: "Dataset") -> "Dataset":
    """The table; DataError if it is empty, and a log line if some of its texts are."""
    if not len(table):
        raise DataError(f"{source.name}: no rows")
    log_odd_rows(table, {"text": "text"}, source.name)
    return table


def read_records(source: Source, columns: Collection[str] | None = None) -> Records:
    """The records of a source with their places, with a progress bar on a terminal.

    columns: limits what is read where the format allows.
    """
    if not source.files:
        table = load_hub(source)
        known = table if columns is None else table.select_columns([c for c in table.column_names if c in columns])
        yield from _hub_rows(source, known)
        return
    in_files = dict(source.columns)
    names = None if columns is None else {in_files.get(name, name) for name in columns}
    with progress_bar(sum(map(size_of, source.files)), "reading", unit=BYTES) as bar:
        rows = records.read_records(source.files, columns=names, on_bytes=bar.update)
        yield from _renamed(rows, source) if source.columns else rows


def _renamed(rows: Records, source: Source) -> Records:
    """The records with columns under the names of `source.columns`, which hide columns of the file that are called so."""
    names = {column: name for name, column in source.columns}
    hidden = names.values() - names.keys()
    for place, row in rows:
        renamed = {names.get(column, column): value for column, value in row.items() if column not in hidden}
        yield place._replace(renamed=source.columns), renamed


def locate_row(source: Source, number: int) -> Place:
    """The place of row `number` of the whole source: its file and its number there."""
    return next((place for place, _ in islice(read_records(source), number - 1, None)), Place(source.name, number))


def column_names(source: Source) -> list[str]:
    """The names of the columns of a source."""
    if not source.files:
        return load_hub(source).column_names
    names, in_files = records.column_names(source.files), {column: name for name, column in source.columns}
    hidden = in_files.values() - in_files.keys()
    return [in_files.get(name, name) for name in names if name not in hidden]


def _hub_rows(source: Source, table: "Dataset") -> Records:
    """The records of a loaded data set, numbered from 1."""
    number = 0
    with progress_bar(len(table), "reading") as bar:
        for batch in table.iter(batch_size=records.SCHEMA_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield Place(source.name, number), dict(zip(batch, map(drop_missing_keys, values), strict=True))
            bar.update(number - bar.n)


def load_hub(source: Source, *, streaming: bool = False) -> "Dataset | IterableDataset":
    """All columns of a data set of the hub, one split of it; errors become one line.

    `datasets` reads as much as it finds of a truncated cache file, so the number of rows is compared with its metadata.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    configure_progress_bars()
    # load, with errors in one line instead of logs and a traceback
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are raised as well as logged
    try:
        table = load_dataset(source.name, split=source.split, streaming=streaming)
    except DatasetGenerationError as error:
        raise DataError(f"{source.name}: cannot be read ({first_line(error.__cause__ or error)})") from None
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(f"data.path={source.name}: {first_line(error)}") from None
    for name, column in source.columns:
        if name in (table.column_names or ()):
            table = table.remove_columns(name)
        table = table.rename_column(column, name)
    # compare the number of rows with the metadata
    if not streaming and table.split in (splits := table.info.splits or {}):
        expected = splits[table.split].num_examples
        if len(table) != expected:  # datasets reads a truncated file without an error
            where = table.cache_files[0]["filename"] if table.cache_files else "the cache"
            raise DataError(f"{source.name}: {len(table)} of {expected} rows in {where}: damaged; remove its folder")
    return table


def check_columns(source: Source, names: Sequence[str], required: dict[str, str]) -> None:
    """DataError for a required column that the source does not have.

    names: the source's columns. required: the columns by the option that names each, such as {"data.prompt": "question"}.
    """
    if not names:
        raise DataError(f"data.path={source.name}: no rows")
    for option, column in required.items():
        if column not in names:
            listed = ", ".join(names)
            raise DataError(f"data.path={source.name}: no column {column!r}; found: {listed} (set {option})")


def split_rows(table: "Dataset", fraction: float, *, seed: int, path: str) -> "tuple[Dataset, Dataset]":
    """The rows without a random fraction, and that fraction (at least one row), by a permutation of the seed."""
    if len(table) < 2:
        raise DataError(f"data.path={path}: one row cannot be split; set data.val_path")
    n_val = math.ceil(fraction * len(table))
    if n_val == len(table):
        raise DataError(f"data.path={path}: data.val_fraction={fraction} of {len(table)} rows leaves none to train on")
    # the split of train_test_split, which however caches its indices in a file that it reads again unchecked
    order = np.random.default_rng(seed).permutation(len(table))
    val, train = (table.select(part, keep_in_memory=True) for part in (order[:n_val], order[n_val:]))
    return train, val


def configure_progress_bars() -> None:
    """Let `datasets` draw progress bars on a terminal only."""
    with collecting_later():
        from datasets import disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty():
        enable_progress_bars()
    else:
        disable_progress_bars()


def content_hash(source: Source) -> str:
    """A hash of a source's present contents: of the bytes of its files, or of its hub name.

    Of object storage, of sizes and versions (`ETag`), which say without a download what has changed.
    """
    digest = hashlib.blake2b(source.name.encode() if not source.files else b"", digest_size=8)
    if source.columns:
        digest.update(repr(source.columns).encode())
    remote = [file for file in source.files if isinstance(file, RemoteFile)]
    for file in find_files(source.name, "data.path") if remote else ():
        if file.suffix.lower() in BUILDERS:
            digest.update(f"{file.size}/{file.version}{file.suffix}".encode() + b"\0")
    for path in source.files if not remote else ():
        try:
            digest.update(checksummed.cached_digest(path) + path.suffix.encode() + b"\0")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({reason_of(error)})") from None
    return digest.hexdigest()
