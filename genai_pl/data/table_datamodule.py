"""Data in columns, one example per row: what pairs, conversations, preferences and prompts share."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_text
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.loader import Collate
from genai_pl.data.records import Record, Records
from genai_pl.data.table_store import cached_encoding, cached_table, log_empty_cells, to_json
from genai_pl.data.tokenizer import end_token, fingerprint
from genai_pl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


FORMAT = 5  # of encoded rows: raise it when an encoder gives other ones
BatchEncoder = Callable[..., dict[str, list]]  # (batch of columns, tokenizer, **options) -> columns


class TableDataModule(RowsDataModule):
    """Rows of a table, one example each."""

    optional_columns: ClassVar[
        tuple[str, ...]
    ] = ()  # columns that are read where they are there, whatever the options say
    cell_kinds: ClassVar[dict[str, str]] = {}  # by role what its cells are, in the words of `store.TYPES`, if not text

    def __init__(self, *, path: str, val_path: str | None, val_fraction: float, **loading: object) -> None:
        super().__init__(**loading)
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must lie between 0 and 1, not {val_fraction}")
        self.path, self.val_fraction = path, val_fraction
        self.source = sources.find_source(path)
        self.val_source = (
            sources.find_source(val_path, option="data.val_path") if val_path else sources.shipped_validation(path)
        )
        self._tables: tuple[Table, Table] | None = None

    def tables(self) -> tuple["Table", "Table"]:
        """Training and validation rows; without data.val_path a drawn part of them validates."""
        if self._tables is None:
            table = self.read_table(self.source)
            if self.val_source:
                self._tables = table, self.read_table(self.val_source)
            else:
                self._tables = sources.split_rows(table, self.val_fraction, seed=self.seed, path=self.path)
        return self._tables

    def read_table(self, source: sources.Source) -> "Table":
        """The examples of a source in columns by role, with the number of their `row`; DataError for one that is none."""
        columns = sources.column_names(source)
        roles = self.roles(source, columns)
        cell_kinds = {role: self.cell_kinds.get(role, "text") for role in self.table_roles(roles)}
        name = sources.cache_name(source, type(self).__name__, roles, cell_kinds)
        cells = sources.verify_unchanged(source, self._cells(source, roles, cell_kinds))
        table = cached_table(name, {**cell_kinds, "row": "row"}, cells)
        if not len(table):
            raise DataError(f"{source.name}: no rows")
        log_empty_cells(table, cell_kinds, source.name)
        self.log_unused_columns(table, source, roles, columns)
        return table

    def log_unused_columns(
        self, table: "Table", source: sources.Source, roles: Mapping[str, str], columns: Sequence[str]
    ) -> None:
        """Log what stands in the columns of the source and is not in the table."""

    def _cells(
        self, source: sources.Source, roles: Mapping[str, str], cell_kinds: Mapping[str, str]
    ) -> Iterator[tuple[Place, list[object]]]:
        rows = sources.read_records(source, {*roles.values(), *self.optional_columns})
        for number, (place, found) in enumerate(self.examples(rows, roles), start=1):
            cells = [
                to_json(found[role], place) if kind == "json" else found[role] for role, kind in cell_kinds.items()
            ]
            yield place, [*cells, number]

    def roles(self, source: sources.Source, found: Sequence[str]) -> dict[str, str]:
        """The columns that are read, by role; DataError if one of those in `required_columns` is not there."""
        sources.check_columns(source, found, self.required_columns())
        return {option.removeprefix("data."): column for option, column in self.required_columns().items()}

    def required_columns(self) -> dict[str, str]:
        """The columns that must be there, by the option that names them."""
        raise NotImplementedError

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
        """The roles of the columns of the table."""
        return list(roles)

    def examples(self, rows: Records, roles: Mapping[str, str]) -> Iterator[tuple[Place, dict[str, object]]]:
        """The example of each row."""
        return ((place, self.example(row, roles, place)) for place, row in rows)

    def example(self, row: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        """What a row says in each of the stored roles."""
        return {role: parse_text(row.get(column), place._replace(column=column)) for role, column in roles.items()}

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        self.tokenizer, self.collate = tokenizer, collate
        self.tokenizer_name = f"{fingerprint(tokenizer)}/{end_token(tokenizer)}/{tokenizer.chat_template}"
        self.train_rows, self.val_rows = (self.rows(table) for table in self.tables())

    def rows(self, table: "Table") -> Dataset:
        """The tokenized rows."""
        raise NotImplementedError

    def encode_table(self, table: "Table", roles: Sequence[str], encode: BatchEncoder, **options: object) -> "Table":
        """What `encode` makes of the columns of the roles; kept on disk by all that it depends on."""
        sources.configure_progress_bars()
        chosen = table.select_columns([*roles, "row"])
        name = f"{FORMAT}/{encode.__qualname__}/{chosen._fingerprint}/{self.tokenizer_name}/{options}"
        name = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        source = self.source_of(table)
        parsed = [role for role in roles if self.cell_kinds.get(role) == "json"]
        fixed = {"encode": encode, "parsed": parsed, "source": source, "tokenizer": self.tokenizer}
        return cached_encoding("rows", name, chosen, partial(_encoded, **fixed, **options), batch_size=1000)

    def source_of(self, table: "Table") -> sources.Source:
        """Where the rows of a table come from."""
        is_val = self.val_source is not None and table is not self.tables()[0]
        return self.val_source if is_val else self.source

    def summary(self) -> str:
        return f"{self.path}, {len(self.train_rows):,} rows for training, {len(self.val_rows):,} held"


def _encoded(
    batch: dict[str, list], *, encode: BatchEncoder, parsed: Sequence[str], source: sources.Source, **options: object
) -> dict[str, list]:
    """What `encode` makes of the batch, in which the columns `parsed` are JSON; a DataError names the row."""
    rows = batch["row"]
    columns = {k: [*map(json.loads, v)] if k in parsed else v for k, v in batch.items() if k != "row"}
    try:
        return encode(columns, **options)
    except DataError:
        for number, row in enumerate(rows):
            try:
                encode({role: values[number : number + 1] for role, values in columns.items()}, **options)
            except DataError as error:
                raise DataError(f"{sources.locate_row(source, row)}: {error}") from None
        raise


def as_arrays(table: "Table", column: str) -> list[np.ndarray]:
    """The as_arrays of a column of numbers, as arrays that lie in the file the table is mapped from."""
    found: list[np.ndarray] = []
    for chunk in table.select_columns([column]).with_format("arrow")[:][column].chunks:
        ends = chunk.offsets.to_numpy()
        found += np.split(chunk.flatten().to_numpy(), ends[1:-1] - ends[0])
    return found
