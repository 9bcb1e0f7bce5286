"""Data in columns, one example per row: what pairs, conversations, preferences and prompts share."""

from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.chat import ensure_template
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.loader import Collate
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class TableDataModule(RowsDataModule):
    """Rows of a table, one example each."""

    talks = True  # whether examples may be conversations

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

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        if self.talks:
            ensure_template(tokenizer)
        self.tokenizer, self.collate = tokenizer, collate
        self.train_rows, self.val_rows = (self.rows(table) for table in self.tables())

    def rows(self, table: "Table") -> Dataset:
        """The tokenized rows."""
        raise NotImplementedError

    def summary(self) -> str:
        return f"{self.path}, {len(self.train_rows):,} rows for training, {len(self.val_rows):,} held"

    def _text(self, value: object) -> str:
        """A prompt as text, conversations rendered."""
        if isinstance(value, str):
            return value
        return self.tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
