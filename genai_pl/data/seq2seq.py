"""Sequence-to-sequence data: sources and targets, packed whole into rows for an encoder and a decoder.

Both sides of a pair are closed by the end token and truncated to seq_len.
"""

from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from genai_pl.data.loader import Collate
from genai_pl.data.packing import PackedPairs
from genai_pl.data.pairs import TextsDataModule
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class Seq2SeqDataModule(TextsDataModule):
    """Rows of one pair or of several (`PackedPairs`).

    source, target: names of the columns. packing: put several pairs into a row. Other arguments: see `TableDataModule`.
    """

    kind = "seq2seq"

    def __init__(self, *, source: str, target: str, packing: bool, **rest: object) -> None:
        super().__init__(texts={"source": source, "target": target}, **rest)
        self.packing = packing

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        super().prepare(tokenizer, collate)
        if not len(self.train_rows):
            raise DataError(f"data.path={self.path}: no rows to train on")

    def rows(self, table: "Table") -> Dataset:
        return PackedPairs(self.tokenized_texts(table), self.seq_len if self.packing else 0)

    def summary(self) -> str:
        train, val = self.tables()
        return f"{self.path}, {len(train):,} pairs for training in {len(self.train_rows):,} rows, {len(val):,} held"

    def prompt(self) -> str:
        return self.tables()[1][0]["source"]
