"""Where text comes from: files, folders, globs, shipped sets and hub names become one `datasets` table of documents."""

import glob
import hashlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

CORPUS = Path(__file__).parent / "corpus"
BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class Source(NamedTuple):
    """A place that documents are read from: local files of one kind, or a name on the hub."""

    name: str
    files: tuple[Path, ...] = ()
    split: str = "train"

    @property
    def builder(self) -> str:
        return BUILDERS[self.files[0].suffix.lower()] if self.files else self.name


def find(path: str, *, option: str = "data.path") -> Source:
    """The source that a path, folder, glob, shipped name or hub name stands for; a DataError names what is missing."""
    if Path(path).is_file():
        files = [Path(path)]
    elif Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.suffix.lower() in BUILDERS and p.is_file())
        if not files:
            raise DataError(f"{option}={path}: no {', '.join(BUILDERS)} file in this folder")
    else:
        files = sorted(Path(p) for p in glob.glob(path, recursive=True) if Path(p).is_file())
    if files:
        return _local(path, files, option)
    if (CORPUS / path).is_dir():
        return _local(path, [next((CORPUS / path).glob("train.*"))], option)
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).suffix:
        return Source(path)
    shipped = ", ".join(sorted(p.name for p in CORPUS.iterdir() if p.is_dir()))
    raise DataError(
        f"{option}={path}: no such file or folder (shipped sets: {shipped}; hub names look like owner/name)"
    )


def shipped_validation(path: str) -> Source | None:
    """The validation file of a shipped set, or None for anything else."""
    if Path(path).exists() or not (CORPUS / path).is_dir():
        return None
    return _local(path, list((CORPUS / path).glob("val.*")), "data.path")


def _local(path: str, files: list[Path], option: str) -> Source:
    foreign = [p for p in files if p.suffix.lower() not in BUILDERS]
    if foreign:
        raise DataError(f"{option}={foreign[0]}: unknown kind of file; known: {', '.join(BUILDERS)}")
    kinds = {BUILDERS[p.suffix.lower()] for p in files}
    if len(kinds) > 1:
        raise DataError(f"{option}={path}: files of several kinds ({', '.join(sorted(kinds))}); name one with a glob")
    if all(p.stat().st_size == 0 for p in files):
        raise DataError(f"{option}={path}: empty")
    return Source(path, tuple(files))


def read(source: Source, column: str, *, streaming: bool = False) -> "Dataset | IterableDataset":
    """The documents of a source in a column `text`; a streamed .txt comes line by line, else a file is one document."""
    table = read_table(source, streaming=streaming)
    check_columns(source, table, {"data.column": column})
    table = table.select_columns([column])
    return table if column == "text" else table.rename_column(column, "text")


def read_table(source: Source, *, streaming: bool = False) -> "Dataset | IterableDataset":
    """All columns of a source."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    options = {}
    if source.files:
        options["data_files"] = {source.split: [str(p) for p in source.files]}
    if source.builder == "text":
        options |= {"sample_by": "line" if streaming else "document", "keep_linebreaks": True}
    show_progress()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it would log is raised too
    try:
        return load_dataset(source.builder, split=source.split, streaming=streaming, **options)
    except (DatasetGenerationError, UnicodeDecodeError) as error:
        raise DataError(_why_unreadable(source, error)) from None
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise DataError(f"data.path={source.name}: {str(error).splitlines()[0]}") from None


def check_columns(source: Source, table: "Dataset | IterableDataset", wanted: dict[str, str]) -> None:
    """DataError for a column that is not there; `wanted` maps the option that names a column to the column."""
    columns = table.column_names or list(next(iter(table), {}))
    for option, column in wanted.items():
        if column not in columns:
            found = ", ".join(columns)
            raise DataError(f"data.path={source.name}: no column {column!r}; found: {found} (set {option})")


def split_rows(table: "Dataset", fraction: float, *, seed: int, path: str) -> "tuple[Dataset, Dataset]":
    """All rows but a drawn fraction, and that."""
    if len(table) < 2:
        raise DataError(f"data.path={path}: one row cannot be split; set data.val_path")
    parts = table.train_test_split(fraction, seed=seed)
    return parts["train"], parts["test"]


def show_progress() -> None:
    """Let `datasets` draw its bars on a terminal only: in a file they are noise."""
    from datasets import disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty():
        enable_progress_bars()
    else:
        disable_progress_bars()


def content_hash(source: Source) -> str:
    """A name for what the source says: the bytes of its files, or its hub name."""
    digest = hashlib.blake2b(source.name.encode() if not source.files else b"", digest_size=8)
    for path in source.files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(path.suffix.encode() + b"\0")
    return digest.hexdigest()


def _why_unreadable(source: Source, error: Exception) -> str:
    """Names the file and the place of the first bytes that are not UTF-8, or repeats the reader's own first line."""
    for path in source.files:
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError as bad:
            line = path.read_bytes()[: bad.start].count(b"\n") + 1
            return f"{path}: not UTF-8 at byte {bad.start} (line {line}); convert it, for example with iconv"
    cause = error.__cause__ or error
    return f"{source.name}: cannot be read as {source.builder} ({str(cause).splitlines()[0]})"
