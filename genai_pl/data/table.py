"""Data in columns, one example per row: what pairs, conversations, preferences and prompts share."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.chat import prompt_text
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.documents import cache_folder
from genai_pl.data.loader import Collate
from genai_pl.data.tokenizer import end_token, fingerprint
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


FORMAT = 3  # of encoded rows: raise it when an encoder gives other ones
Encode = Callable[..., dict[str, list]]  # (batch of columns, tokenizer, **options) -> columns


class TableDataModule(RowsDataModule):
    """Rows of a table, one example each."""

    def __init__(self, *, path: str, val_path: str | None, val_fraction: float, **loading: object) -> None:
        super().__init__(**loading)
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must lie between 0 and 1, not {val_fraction}")
        self.path, self.val_fraction = path, val_fraction
        self.source = sources.find(path)
        self.val_source = (
            sources.find(val_path, option="data.val_path") if val_path else sources.shipped_validation(path)
        )
        self._tables: tuple[Table, Table] | None = None

    def tables(self) -> tuple["Table", "Table"]:
        """Training and validation rows; without data.val_path a drawn part of them validates."""
        if self._tables is None:
            table = self.read(self.source)
            if self.val_source:
                self._tables = table, self.read(self.val_source)
            else:
                self._tables = sources.split_rows(table, self.val_fraction, seed=self.seed, path=self.path)
        return self._tables

    def read(self, source: sources.Source) -> "Table":
        """The table of a source, with the columns that are wanted; DataError if one is missing."""
        table = sources.read_table(source)
        sources.check_columns(source, table, self.wanted())
        return table

    def wanted(self) -> dict[str, str]:
        """The columns that must be there, by the option that names them."""
        raise NotImplementedError

    def has_conversations(self) -> bool:
        train, _ = self.tables()
        row = train[0] if len(train) else {}
        return any(_is_conversation(row.get(column)) for column in self.conversation_columns())

    def conversation_columns(self) -> Sequence[str]:
        """The columns that may hold messages."""
        return ()

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        self.tokenizer, self.collate = tokenizer, collate
        self.tokens_name = f"{fingerprint(tokenizer)}/{end_token(tokenizer)}/{tokenizer.chat_template}"
        self.train_rows, self.val_rows = (self.rows(table) for table in self.tables())

    def rows(self, table: "Table") -> Dataset:
        """The tokenized rows."""
        raise NotImplementedError

    def encoded(self, table: "Table", roles: Mapping[str, str], encode: Encode, **options: object) -> "Table":
        """What `encode` makes of the columns of the roles, called by these; kept on disk by all that it depends on."""
        sources.show_progress()
        chosen = table.select_columns(list(roles.values()))
        chosen = chosen.rename_columns({column: role for role, column in roles.items() if role != column})
        name = f"{FORMAT}/{encode.__qualname__}/{chosen._fingerprint}/{self.tokens_name}/{options}"
        name = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        return chosen.map(
            encode,
            batched=True,
            fn_kwargs={"tokenizer": self.tokenizer, **options},
            remove_columns=chosen.column_names,
            new_fingerprint=name,
            cache_file_name=str(cache_folder() / f"rows-{name}.arrow"),
            desc="tokenizing",
        )

    def summary(self) -> str:
        return f"{self.path}, {len(self.train_rows):,} rows for training, {len(self.val_rows):,} held"

    def _text(self, value: object) -> str:
        """A prompt as text, conversations rendered."""
        return prompt_text(self.tokenizer, value)


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def lists(table: "Table", column: str) -> list[np.ndarray]:
    """The lists of a column of numbers, as arrays that lie in the file the table is mapped from."""
    found: list[np.ndarray] = []
    for chunk in table.select_columns([column]).with_format("arrow")[:][column].chunks:
        ends = chunk.offsets.to_numpy()
        found += np.split(chunk.flatten().to_numpy(), ends[1:-1] - ends[0])
    return found
