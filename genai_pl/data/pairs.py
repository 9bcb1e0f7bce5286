"""Pairs of texts that belong together, and texts that do not: the data of contrastive learning."""

from typing import TYPE_CHECKING

from genai_pl.data.table_datamodule import TableDataModule
from genai_pl.data.text_tokens import encode_texts
from genai_pl.data.tokenizer import train_bpe
from genai_pl.objectives.pairs import PairCollator

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("anchor", "positive", "negative")


class TextsDataModule(TableDataModule):
    """Rows of several texts, each tokenized by itself; `columns` are the table's by the roles of the texts."""

    def __init__(self, *, columns: dict[str, str], **rest: object) -> None:
        super().__init__(**rest)
        self.columns = columns

    def required_columns(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        return train_bpe((row[role] for row in train for role in self.columns), vocab_size)

    def tokenized_texts(self, table: "Dataset") -> "Dataset":
        """Token ids of all texts."""
        return self.encode_table(
            table, list(self.columns), tokenize_texts, seq_len=self.seq_len, **self.encode_options()
        ).with_format("numpy")

    def encode_options(self) -> dict[str, object]:
        """How a text becomes tokens, beyond its length: options of `tokenize_texts`."""
        return {}


class PairsDataModule(TextsDataModule):
    """Rows of two or three tokenized texts each; a role without a column is left out."""

    kind = "pairs"

    def __init__(self, *, anchor: str, positive: str | None, negative: str | None, **rest: object) -> None:
        named = {"anchor": anchor, "positive": positive, "negative": negative}
        super().__init__(columns={role: column for role, column in named.items() if column is not None}, **rest)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: PairCollator) -> None:
        self.seq_len = min(self.seq_len, collate.max_length or self.seq_len)
        super().prepare(tokenizer, collate)

    def encode_options(self) -> dict[str, object]:
        return {"prompt": self.collate.prompt, "closes": self.collate.closes}

    def rows(self, table: "Dataset") -> "Dataset":
        return self.tokenized_texts(table)

    def summary(self) -> str:
        return f"{self.path}, {len(self.train_rows):,} {'/'.join(self.columns)} rows for training, {len(self.val_rows):,} held"

    def prompt(self) -> str:
        return self.tables()[1][0]["anchor"]


def tokenize_texts(
    batch: dict[str, list[str]],
    tokenizer: "PreTrainedTokenizerBase",
    seq_len: int,
    prompt: str = "",
    closes: bool = True,
) -> dict[str, list[list[int]]]:
    """Token ids of the texts of each column behind the prompt, cut to seq_len, special tokens and an end token included."""
    return {
        role: encode_texts(tokenizer, [prompt + text for text in texts], max_length=seq_len, closes=closes)
        for role, texts in batch.items()
    }
