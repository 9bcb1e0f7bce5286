"""The base of data modules that read columns, one example per row: pairs, conversations, preferences and prompts.

Two cached steps: `read_table` parses the source into columns by role, `encode_table` tokenizes these. Either cache is
named after everything that its contents depend on, so changing the tokenizer repeats the second step alone.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_text
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.duplicates import check_mode, without_duplicates
from genai_pl.data.loader import Collate
from genai_pl.data.odd_rows import log_odd_rows
from genai_pl.data.records import Record, Records
from genai_pl.data.table_store import cached_encoding, cached_table, to_json
from genai_pl.data.tokenizer import end_token, fingerprint
from genai_pl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


FORMAT = 6  # version of encoded rows: raise it when an encoder changes
BatchEncoder = Callable[..., dict[str, list]]  # (batch of columns, tokenizer, **options) -> columns


class TableDataModule(RowsDataModule):
    """Examples of a table, one per row.

    path: the training data (`sources.find_source`). val_path: the validation data, or None for `val_fraction` of the rows
    of `path`, by a permutation of the seed. columns: {name: name in the files} of columns with other names. deduplicate:
    None, or `exact` or `near`: rows that repeat an earlier one are left out, before any are held back.
    Other arguments: see `RowsDataModule`.

    A subclass defines `kind`, `required_columns` or `roles`, `rows`, and `example` where cells are not plain texts.
    optional_columns: columns that are read where the source has them, whatever the options say.
    cell_kinds: the type of the cells of a role (`table_store.TYPES`), where it is not text.
    """

    optional_columns: ClassVar[tuple[str, ...]] = ()
    cell_kinds: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None,
        val_fraction: float,
        columns: Mapping[str, str] | None = None,
        deduplicate: str | None = None,
        **loading: object,
    ) -> None:
        super().__init__(**loading)
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must lie between 0 and 1, not {val_fraction}")
        check_mode(deduplicate)
        self.path, self.val_fraction, self.deduplicate = path, val_fraction, deduplicate
        self.source = sources.find_source(path, columns=columns)
        self.val_source = (
            sources.find_source(val_path, option="data.val_path", columns=columns)
            if val_path
            else sources.shipped_validation(path)
        )
        self._tables: tuple[Table, Table] | None = None
        self.encoders = 0  # processes that tokenize, 0: this one
        self.errors: list[str] | None = None  # of rows that are left out, where somebody collects them

    def tables(self) -> tuple["Table", "Table"]:
        """Training and validation table; without data.val_path, a random fraction of the rows validates."""
        if self._tables is None:
            table = without_duplicates(self.read_table(self.source), self.deduplicate, name=self.path)
            if self.val_source:
                self._tables = table, self.read_table(self.val_source)
            else:
                self._tables = sources.split_rows(table, self.val_fraction, seed=self.seed, path=self.path)
        return self._tables

    def read_table(self, source: sources.Source) -> "Table":
        """The examples of a source in columns by role, with the number of their `row`; DataError for a bad one."""
        sources.configure_progress_bars()
        columns = sources.column_names(source)
        roles = self.roles(source, columns)
        # columns of the source become columns by role, which are cached
        cell_kinds = {role: self.cell_kinds.get(role, "text") for role in self.table_roles(roles)}
        name = sources.cache_name(source, type(self).__name__, roles, cell_kinds)
        cells = sources.verify_unchanged(source, self._cells(source, roles, cell_kinds))
        table = cached_table(name, {**cell_kinds, "row": "row"}, cells)
        if not len(table) and self.errors:
            raise DataError(f"{self.errors[0]} (none of the {len(self.errors):,} rows can be read)")
        if not len(table):
            raise DataError(f"{source.name}: no rows")
        log_odd_rows(table, cell_kinds, source.name)
        self.log_unused_columns(table, source, roles, columns)
        return table

    def log_unused_columns(
        self, table: "Table", source: sources.Source, roles: Mapping[str, str], columns: Sequence[str]
    ) -> None:
        """Log what the source's other columns hold; a hook for subclasses."""

    def _cells(
        self, source: sources.Source, roles: Mapping[str, str], cell_kinds: Mapping[str, str]
    ) -> Iterator[tuple[Place, list[object]]]:
        """The cells of each example in the order of the roles, and the number of its row."""
        records = sources.read_records(source, {*roles.values(), *self.optional_columns})
        for number, (place, example) in enumerate(self.examples(records, roles), start=1):
            if example is None:
                continue
            cells = [
                to_json(example[role], place) if kind == "json" else example[role] for role, kind in cell_kinds.items()
            ]
            yield place, [*cells, number]

    def roles(self, source: sources.Source, names: Sequence[str]) -> dict[str, str]:
        """The columns to read, by role; DataError if one of `required_columns` is missing."""
        sources.check_columns(source, names, self.required_columns())
        return {option.removeprefix("data."): column for option, column in self.required_columns().items()}

    def required_columns(self) -> dict[str, str]:
        """The columns that the source must have, by the option that names each."""
        raise NotImplementedError

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
        """The roles that the table has columns for."""
        return list(roles)

    def examples(self, records: Records, roles: Mapping[str, str]) -> Iterator[tuple[Place, dict[str, object] | None]]:
        """The example of each record, with its place; None for a record whose error is collected."""
        for place, record in records:
            try:
                example = self.example(record, roles, place)
            except DataError as error:
                example = self.leave_out(error)
            yield place, example

    def leave_out(self, error: DataError) -> None:
        """Collect the error of a row that is left out; raise it where nobody collects errors."""
        if self.errors is None:
            raise error
        self.errors.append(str(error))

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        """The parsed cells of a record, by role; here all are texts."""
        return {role: parse_text(record.get(column), place.at(column)) for role, column in roles.items()}

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        self.tokenizer, self.collate = tokenizer, collate
        self.tokenizer_name = f"{fingerprint(tokenizer)}/{end_token(tokenizer)}/{tokenizer.chat_template}"
        self.train_rows, self.val_rows = (self.rows(table) for table in self.tables())

    def rows(self, table: "Table") -> Dataset:
        """The tokenized rows of a table, as the collator reads them."""
        raise NotImplementedError

    def encode_table(self, table: "Table", roles: Sequence[str], encode: BatchEncoder, **options: object) -> "Table":
        """The table that `encode` makes of the columns of the roles, cached.

        encode: (batch of columns, tokenizer, **options) -> columns; a top-level function, as its name is part of the cache's.
        """
        sources.configure_progress_bars()
        columns = table.select_columns([*roles, "row"])
        # the cache's name: the encoder, its input, the tokenizer and the options
        name = f"{FORMAT}/{encode.__qualname__}/{columns._fingerprint}/{self.tokenizer_name}/{options}"
        name = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        source = self.source_of(table)
        json_roles = [role for role in roles if self.cell_kinds.get(role) == "json"]
        bound = {"encode": encode, "json_roles": json_roles, "source": source, "tokenizer": self.tokenizer}
        return cached_encoding(
            "rows", name, columns, partial(_encoded, **bound, **options), batch_size=1000, processes=self.encoders
        )

    def source_of(self, table: "Table") -> sources.Source:
        """The source of a table, for errors."""
        is_val = self.val_source is not None and table is not self.tables()[0]
        return self.val_source if is_val else self.source

    def summary(self) -> str:
        return f"{self.path}, {len(self.train_rows):,} rows for training, {len(self.val_rows):,} held"


def _encoded(
    batch: dict[str, list],
    *,
    encode: BatchEncoder,
    json_roles: Sequence[str],
    source: sources.Source,
    **options: object,
) -> dict[str, list]:
    """The batch encoded, with its JSON columns parsed.

    An encoder takes a whole batch, so its DataError names no row: the rows are then encoded one by one to find it.
    """
    rows = batch["row"]
    columns = {k: [*map(json.loads, v)] if k in json_roles else v for k, v in batch.items() if k != "row"}
    try:
        return encode(columns, **options)
    except DataError:
        for number, row in sorted(enumerate(rows), key=itemgetter(1)):  # the first one in the file
            try:
                encode({role: values[number : number + 1] for role, values in columns.items()}, **options)
            except DataError as error:
                raise DataError(f"{sources.locate_row(source, row)}: {error}") from None
        raise


def as_arrays(table: "Table", column: str) -> list[np.ndarray]:
    """The lists of a column of numbers as arrays, which are views of the memory-mapped file.

    A million `table[n]` would take minutes; the offsets of the arrow column give all arrays at once.
    """
    arrays: list[np.ndarray] = []
    for chunk in table.select_columns([column]).with_format("arrow")[:][column].chunks:
        ends = chunk.offsets.to_numpy()
        arrays += np.split(chunk.flatten().to_numpy(), ends[1:-1] - ends[0])
    return arrays


def report_cut(rows: Iterable[Sized], limit: int) -> None:
    """Log how many of the tokenized texts or pairs fill the limit, where longer ones were cut."""
    lengths = np.array([len(row) for row in rows])
    if n := int((lengths >= limit).sum()):
        log.info(
            "data        %d of %d texts fill %d tokens, where longer ones are cut (data.seq_len)",
            n,
            len(lengths),
            limit,
        )
