"""Pairs of texts that belong together, and texts that do not: the data of contrastive learning."""

import hashlib
from typing import TYPE_CHECKING

from genai_pl.data import sources
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.documents import cache_folder
from genai_pl.data.loader import Collate
from genai_pl.data.tokenizer import end_token, fingerprint, train_bpe
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("anchor", "positive", "negative")


class PairsDataModule(RowsDataModule):
    """Rows of two or three tokenized texts each; a role without a column is left out."""

    kind = "pairs"

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None,
        val_fraction: float,
        anchor: str,
        positive: str | None,
        negative: str | None,
        **loading: object,
    ) -> None:
        super().__init__(**loading)
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must lie between 0 and 1, not {val_fraction}")
        self.path, self.val_fraction = path, val_fraction
        named = {"anchor": anchor, "positive": positive, "negative": negative}
        self.columns = {role: column for role, column in named.items() if column is not None}
        self.source = sources.find(path)
        self.val_source = sources.find(val_path, option="data.val_path") if val_path else None
        self._texts: tuple[Dataset, Dataset] | None = None

    def texts(self) -> tuple["Dataset", "Dataset"]:
        """Training and validation pairs, by role; without data.val_path a drawn part of the rows validates."""
        if self._texts is None:
            table = self._read(self.source)
            if self.val_source:
                self._texts = table, self._read(self.val_source)
            else:
                self._texts = sources.split_rows(table, self.val_fraction, seed=self.seed, path=self.path)
        return self._texts

    def _read(self, source: sources.Source) -> "Dataset":
        table = sources.read_table(source)
        sources.check_columns(source, table, {f"data.{role}": column for role, column in self.columns.items()})
        return table.select_columns(list(self.columns.values())).rename_columns(
            {column: role for role, column in self.columns.items() if role != column}
        )

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.texts()
        return train_bpe((row[role] or "" for row in train for role in self.columns), vocab_size)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        self.tokenizer, self.collate = tokenizer, collate
        self.train_rows, self.val_rows = (self._tokenize(table) for table in self.texts())

    def _tokenize(self, table: "Dataset") -> "Dataset":
        sources.show_progress()
        name = f"1/{table._fingerprint}/{fingerprint(self.tokenizer)}/{self.seq_len}"
        name = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        return table.map(
            encode_texts,
            batched=True,
            fn_kwargs={"tokenizer": self.tokenizer, "seq_len": self.seq_len},
            new_fingerprint=name,
            cache_file_name=str(cache_folder() / f"pairs-{name}.arrow"),
            desc="tokenizing",
        ).with_format("numpy")

    def summary(self) -> str:
        return f"{self.path}, {len(self.train_rows):,} {'/'.join(self.columns)} rows for training, {len(self.val_rows):,} held"

    def prompt(self) -> str:
        return self.texts()[1][0]["anchor"]


def encode_texts(
    batch: dict[str, list[str]], tokenizer: "PreTrainedTokenizerBase", seq_len: int
) -> dict[str, list[list[int]]]:
    """Token ids of the texts of each column, cut to seq_len, the tokenizer's special tokens and an end token included."""
    end = end_token(tokenizer)
    encoded = {}
    for role, texts in batch.items():
        rows = tokenizer([text or "" for text in texts], truncation=True, max_length=seq_len)["input_ids"]
        encoded[role] = [row if end is None or row[-1:] == [end] else [*row[: seq_len - 1], end] for row in rows]
    return encoded
