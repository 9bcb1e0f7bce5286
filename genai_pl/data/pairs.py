"""Pair data: texts that belong together, with or without hard negatives, for contrastive learning.

Each text of a row is tokenized by itself, with the special tokens that its tokenizer adds. With an anchor alone the
collator pairs a text with itself, and dropout makes the two views (SimCSE: Gao et al. 2021).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from genai_pl.data.table_datamodule import TableDataModule
from genai_pl.data.text_tokens import encode_texts
from genai_pl.objectives.pairs import PairCollator

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ROLES = ("anchor", "positive", "negative")


class TextsDataModule(TableDataModule):
    """The base of rows of several texts, each tokenized by itself.

    texts: names of the columns of texts by their roles. Other arguments: see `TableDataModule`.
    """

    def __init__(self, *, texts: dict[str, str], **rest: object) -> None:
        super().__init__(**rest)
        self.columns = texts

    def required_columns(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        return (row[role] for row in train for role in self.columns)

    def tokenized_texts(self, table: "Dataset", *, cut: bool = True) -> "Dataset":
        """The token ids of all texts of a table, one column for each role; cut: truncated to seq_len."""
        return self.encode_table(
            table, list(self.columns), tokenize_texts, seq_len=self.seq_len if cut else None, **self.encode_options()
        ).with_format("numpy")

    def encode_options(self) -> dict[str, object]:
        """Options of `tokenize_texts` beyond the length."""
        return {}


class PairsDataModule(TextsDataModule):
    """Rows of one to three tokenized texts each; a role without a column is left out.

    anchor, positive, negative: names of the columns; None leaves the role out.
    """

    kind = "pairs"

    def __init__(self, *, anchor: str, positive: str | None, negative: str | None, **rest: object) -> None:
        named = {"anchor": anchor, "positive": positive, "negative": negative}
        super().__init__(texts={role: column for role, column in named.items() if column is not None}, **rest)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: PairCollator) -> None:
        self.seq_len = min(self.seq_len, collate.max_length or self.seq_len)
        super().prepare(tokenizer, collate)

    def encode_options(self) -> dict[str, object]:
        return {"prompt": self.collate.prompt, "add_end": self.collate.add_end}

    def rows(self, table: "Dataset") -> "Dataset":
        return self.tokenized_texts(table)

    def summary(self) -> str:
        return f"{self.path}, {len(self.train_rows):,} {'/'.join(self.columns)} rows for training, {len(self.val_rows):,} held"

    def prompt(self) -> str:
        return self.tables()[1][0]["anchor"]


def tokenize_texts(
    batch: dict[str, list[str]],
    tokenizer: "PreTrainedTokenizerBase",
    seq_len: int | None,
    prompt: str = "",
    add_end: bool = True,
) -> dict[str, list[list[int]]]:
    """Token ids of the texts of each column, after the prompt and at most seq_len long; None for no limit.

    Special tokens count, and are kept when a text is truncated; so is the end token of `add_end`.
    """
    return {
        role: encode_texts(tokenizer, [prompt + text for text in texts], max_length=seq_len, add_end=add_end)
        for role, texts in batch.items()
    }
