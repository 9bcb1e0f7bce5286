"""The data command: rows as a run would read them, with lengths and faults, or tokenized once into the cache of train.py.

Both go the way of a run up to its data: the same data module, tokenizer, chat template and collator, but no weights.
"""

import heapq
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from omegaconf import DictConfig

from genai_pl.cli.length_picture import draw_lengths, picture_line
from genai_pl.cli.row_view import legend, row_lines
from genai_pl.data import sources
from genai_pl.data.chat import ChatDataModule
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.duplicates import unique_rows
from genai_pl.data.inspection import CUT, GIVEN, LEARNED, Counts, InspectedRow, inspected_rows
from genai_pl.data.mixture_datamodule import MixtureDataModule
from genai_pl.data.prompts import PromptsDataModule
from genai_pl.data.table_datamodule import TableDataModule
from genai_pl.data.table_store import cache_folder
from genai_pl.data.text import TextDataModule
from genai_pl.errors import ConfigError, DataError
from genai_pl.training.data_only import DataOnly, open_data, tokenize_data
from genai_pl.training.hydra_job import job_overrides

SHOWN_ERRORS = 5  # rows that cannot be read, of which the line is printed


def inspect(config: DictConfig) -> int:
    """Print rows, lengths and faults of the data, and draw the lengths; status 1 where rows cannot be read."""
    if config.rows < 0 or config.width < 100:
        raise ConfigError(f"rows={config.rows}, width={config.width}: at least 0 rows, of at least 100 characters")
    read = open_data(config)
    if isinstance(read.data, MixtureDataModule):
        raise ConfigError("data.sources: inspect looks at one source: data.py inspect PATH")
    if read.data.streaming:
        raise ConfigError("data.streaming=true: data.py reads files as a whole; leave it out")
    with _reading(read.data) as errors:
        read = tokenize_data(config, read)
        tables = _tables(read.data)
        counts, shown = _count(read.data, tables, config.rows)
        _print_summary(config, read, tables, counts, errors)
    for row in shown:
        print(*row_lines(row, read.tokenizer, width=config.width, color=config.color), sep="\n")
    if shown:
        print(legend(color=config.color))
    # the picture last: matplotlib may be missing
    if config.picture and counts.lengths:
        picture = draw_lengths(counts.lengths, _limit(read), Path(config.picture), title=config.data.path)
        print(picture_line(picture), flush=True)
    return 1 if errors else 0


def prepare(config: DictConfig) -> int:
    """Tokenize the data into the cache, and print the command that reads them; the exit status."""
    if config.encoders < 0:
        raise ConfigError(f"encoders={config.encoders} must be at least 0")
    start = time.monotonic()
    read = open_data(config)
    if read.data.streaming:
        raise ConfigError("data.streaming=true: a stream is tokenized while it trains; leave it out")
    modules = [source.data for source in read.data.sources] if isinstance(read.data, MixtureDataModule) else [read.data]
    tables = [data for data in modules if isinstance(data, TableDataModule)]
    for data in tables:
        data.encoders = config.encoders
    if config.encoders and not tables:
        raise ConfigError(f"encoders={config.encoders}: texts are tokenized on all cores without it; leave it out")
    read = tokenize_data(config, read)
    print(f"data        {read.data.summary()}")
    print(f"prepared    in {time.monotonic() - start:.1f} s, cached in {cache_folder()}")
    words = [word for word in job_overrides() if word.partition("=")[0] not in ("task", "encoders")]
    print(f"next        python train.py {shlex.join(words)}", flush=True)
    return 0


@contextmanager
def _reading(data: RowsDataModule) -> Iterator[list[str]]:
    """A context in which the tables of the data are read; yields the errors of the rows that cannot be.

    Where there are some, the other rows are read again without them, into a cache that is removed afterwards: the real one
    never holds a part of a file.
    """
    try:
        _read(data)
    except DataError:
        if not isinstance(data, TableDataModule):
            raise
    else:
        yield []
        return
    from datasets import config as datasets_config

    kept = datasets_config.HF_DATASETS_CACHE
    with TemporaryDirectory() as folder:
        datasets_config.HF_DATASETS_CACHE = folder
        try:
            data.errors = []
            _read(data)
            yield data.errors
        finally:
            datasets_config.HF_DATASETS_CACHE = kept


def _read(data: RowsDataModule) -> None:
    """Read the tables of the data."""
    data.tables() if isinstance(data, TableDataModule) else _tables(data)


def _tables(data: RowsDataModule) -> list:
    """The tables whose rows are looked at: all rows of the path; those of data.val_path are another source."""
    if isinstance(data, TextDataModule):
        return [sources.read_documents(data.source, data.column)]
    train, val = data.tables()
    return [train] if data.val_source else [train, val]


def _count(data: RowsDataModule, tables: list, n_shown: int) -> tuple[Counts, list[InspectedRow]]:
    """What is counted over all rows, and the first rows of the source."""
    counts, shown = Counts(), []
    rows = chain.from_iterable(inspected_rows(data, table) for table in tables)
    for row in rows:
        counts.add(row)
        if n_shown and (len(shown) < n_shown or row.number < -shown[0][0]):
            push = heapq.heappush if len(shown) < n_shown else heapq.heapreplace
            push(shown, (-row.number, len(counts.lengths), row))
    return counts, [row for *_, row in sorted(shown, reverse=True)]


def _print_summary(config: DictConfig, read: DataOnly, tables: list, counts: Counts, errors: list[str]) -> None:
    """Print what was read, in lines like those of a run."""
    print(f"data        {read.data.summary()}")
    source = config.init_from or config.tokenizer.kind
    print(f"tokenizer   {source}, {len(read.tokenizer):,} tokens; rows of at most {_limit(read):,}")
    if errors:
        print(f"errors      {len(errors):,} rows cannot be read, and a run stops at the first:")
        print(*(f"            {error}" for error in errors[:SHOWN_ERRORS]), sep="\n")
    total = len(counts.lengths)
    n = np.percentile(counts.lengths, [50, 90, 99, 100]).astype(int)
    print(f"lengths     {total:,} rows; tokens: median {n[0]:,}, 90 % {n[1]:,}, 99 % {n[2]:,}, longest {n[3]:,}")
    if not isinstance(read.data, TextDataModule):
        print(f"cut         {_share(counts.cut, total, counts.first_cut)}")
    print(f"empty       {_share(counts.empty, total, counts.first_empty)}")
    n_unique = len(unique_rows(tables))
    print(f"duplicates  {_share(total - n_unique, total, 0)} repeat an earlier one")
    tokens = counts.tokens / max(counts.tokens.sum(), 1)
    print(
        f"tokens      {counts.tokens.sum():,}: {tokens[LEARNED]:.1%} learned, {tokens[GIVEN]:.1%} given, {tokens[CUT]:.1%} cut"
    )


def _limit(read: DataOnly) -> int:
    """The tokens of a row at most."""
    if isinstance(read.data, ChatDataModule):
        return read.data.capacity
    if isinstance(read.data, PromptsDataModule):
        return min(read.data.max_prompt_len, read.data.seq_len)
    return read.data.seq_len


def _share(n: int, total: int, first: int) -> str:
    """A count of rows with its share, and the first of them."""
    return f"{n:,} of {total:,} rows ({n / max(total, 1):.2%})" + (f", the first is row {first:,}" if first else "")
