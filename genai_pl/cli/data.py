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
from genai_pl.data.inspected_kinds import inspected_rows
from genai_pl.data.inspection import CUT, GIVEN, LEARNED, Counts, InspectedRow
from genai_pl.data.mixture_datamodule import MixedSource, MixtureDataModule
from genai_pl.data.prompts import PromptsDataModule
from genai_pl.data.table_datamodule import TableDataModule
from genai_pl.data.table_store import cache_folder
from genai_pl.data.text import TextDataModule
from genai_pl.errors import ConfigError, DataError
from genai_pl.training.data_only import DataOnly, open_data, tokenize_data
from genai_pl.training.hydra_job import job_overrides

SHOWN_ERRORS = 5  # rows that cannot be read, of which the line is printed


def inspect(config: DictConfig) -> int:
    """Print rows, lengths and faults of each source, and draw the lengths; status 1 where rows cannot be read."""
    if config.rows < 0 or config.width < 100:
        raise ConfigError(f"rows={config.rows}, width={config.width}: at least 0 rows, of at least 100 characters")
    read = open_data(config)
    if read.data.streaming and not isinstance(read.data, MixtureDataModule):
        raise ConfigError("data.streaming=true: data.py reads files as a whole; leave it out")
    pictures = []
    sources = sources_of(read.data)
    with _reading(sources) as errors:
        read = tokenize_data(config, read)
        if len(sources) > 1 or sources[0].data is not read.data:
            print(f"data        {read.data.summary()}")
        for source in sources:
            pictures += _inspect_source(config, read, source, errors[source.name])
    # the pictures last: matplotlib may be missing
    for line in dict.fromkeys(map(picture_line, pictures)):
        print(line, flush=True)
    return 1 if any(errors.values()) else 0


def sources_of(data: RowsDataModule) -> list[MixedSource]:
    """The sources of a mixture, or the only one, which has no name."""
    return data.sources if isinstance(data, MixtureDataModule) else [MixedSource("", data)]


def _inspect_source(config: DictConfig, read: DataOnly, source: MixedSource, errors: list[str]) -> list[Path | None]:
    """Print what is found in a source, and draw its lengths; the pictures."""
    data, name = source.data, source.name
    if name:
        print(f"source      {name}: {data.kind}, {data.path}")
    if data.streaming:
        print("stream      read while it trains: inspect it as a file, without streaming")
        return []
    tables = _tables(data)
    counts, shown = _count(data, tables, config.rows)
    _print_summary(config, read, source, tables, counts, errors)
    for row in shown:
        print(*row_lines(row, read.tokenizer, width=config.width, color=config.color), sep="\n")
    if shown:
        print(legend(color=config.color))
    if not config.picture or not counts.lengths:
        return []
    path = Path(config.picture)
    path = path.with_stem(f"{path.stem}-{name}") if name else path
    return [draw_lengths(counts.lengths, _limit(data), path, title=name or Path(str(data.path)).name)]


def prepare(config: DictConfig) -> int:
    """Tokenize the data into the cache, and print the command that reads them; the exit status."""
    if config.encoders < 0:
        raise ConfigError(f"encoders={config.encoders} must be at least 0")
    start = time.monotonic()
    read = open_data(config)
    if read.data.streaming:
        raise ConfigError("data.streaming=true: a stream is tokenized while it trains; leave it out")
    tables = [source.data for source in sources_of(read.data) if isinstance(source.data, TableDataModule)]
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
def _reading(sources: list[MixedSource]) -> Iterator[dict[str, list[str]]]:
    """A context in which the tables of the sources are read; yields the errors of rows that cannot be, by source.

    Where there are some, the other rows are read again without them, into a cache that is removed afterwards: the real one
    never holds a part of a file.
    """
    files = [source for source in sources if not source.data.streaming]
    try:
        _read(files)
    except DataError:
        if not any(isinstance(source.data, TableDataModule) for source in files):
            raise
    else:
        yield {source.name: [] for source in sources}
        return
    from datasets import config as datasets_config

    kept = datasets_config.HF_DATASETS_CACHE
    with TemporaryDirectory() as folder:
        datasets_config.HF_DATASETS_CACHE = folder
        try:
            for n, source in enumerate(files):
                # a cache of its own: the errors of a file that two sources name are those of both
                source.data.errors, datasets_config.HF_DATASETS_CACHE = [], str(Path(folder, str(n)))
                _read([source])
            yield {source.name: getattr(source.data, "errors", None) or [] for source in sources}
        finally:
            datasets_config.HF_DATASETS_CACHE = kept


def _read(sources: list[MixedSource]) -> None:
    """Read the tables of the sources."""
    for source in sources:
        source.data.tables() if isinstance(source.data, TableDataModule) else _tables(source.data)


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


def _print_summary(
    config: DictConfig, read: DataOnly, source: MixedSource, tables: list, counts: Counts, errors: list[str]
) -> None:
    """Print what was read, in lines like those of a run."""
    data = source.data
    if not source.name:
        print(f"data        {data.summary()}")
    tokenizer = config.init_from or config.tokenizer.kind
    print(f"tokenizer   {tokenizer}, {len(read.tokenizer):,} tokens; rows of at most {_limit(data):,}")
    if errors:
        several = f"{len(errors):,} rows cannot be read, and a run stops at the first:"
        print(f"errors      {several if len(errors) > 1 else '1 row cannot be read, and a run stops at it:'}")
        print(*(f"            {error}" for error in errors[:SHOWN_ERRORS]), sep="\n")
    total = len(counts.lengths)
    n = np.percentile(counts.lengths, [50, 90, 99, 100]).astype(int)
    print(f"lengths     {total:,} rows; tokens: median {n[0]:,}, 90 % {n[1]:,}, 99 % {n[2]:,}, longest {n[3]:,}")
    if not isinstance(data, TextDataModule):
        print(f"cut         {_share(counts.cut, total, counts.first_cut)}")
    print(f"empty       {_share(counts.empty, total, counts.first_empty)}")
    n_unique = len(unique_rows(tables))
    print(f"duplicates  {_share(total - n_unique, total, 0)} repeat an earlier one")
    shares = counts.tokens / max(counts.tokens.sum(), 1)
    states = {LEARNED: "learned", GIVEN: "given", CUT: "cut"}
    shown = [f"{shares[state]:.1%} {name}" for state, name in states.items() if counts.tokens[state] or state == CUT]
    print(f"tokens      {counts.tokens.sum():,}: {', '.join(shown)}")


def _limit(data: RowsDataModule) -> int:
    """The tokens of a row at most."""
    if isinstance(data, ChatDataModule):
        return data.capacity
    if isinstance(data, PromptsDataModule):
        return min(data.max_prompt_len, data.collate.row_length(data.seq_len))
    return data.seq_len


def _share(n: int, total: int, first: int) -> str:
    """A count of rows with its share, and the first of them."""
    return f"{n:,} of {total:,} rows ({n / max(total, 1):.2%})" + (f", the first is row {first:,}" if first else "")
