"""Sources and targets, packed whole into rows for an encoder and a decoder."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.documents import cache_folder
from genai_pl.data.loader import Collate
from genai_pl.data.packing import Row
from genai_pl.data.pairs import encode_texts
from genai_pl.data.table import TableDataModule
from genai_pl.data.tokenizer import fingerprint, train_bpe
from genai_pl.errors import DataError
from genai_pl.objectives.sft import pack

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class Seq2SeqDataModule(TableDataModule):
    """Rows of one pair or several, each text closed by the end token and cut to seq_len."""

    kind = "seq2seq"
    talks = False

    def __init__(self, *, source: str, target: str, packing: bool, **rest: object) -> None:
        super().__init__(**rest)
        self.columns, self.packing = {"source": source, "target": target}, packing

    def wanted(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def read(self, source: sources.Source) -> "Table":
        """The two columns, called source and target."""
        table = super().read(source).select_columns(list(self.columns.values()))
        return table.rename_columns({column: role for role, column in self.columns.items() if role != column})

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        return train_bpe((row[role] or "" for row in train for role in self.columns), vocab_size)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        super().prepare(tokenizer, collate)
        if not len(self.train_rows):
            raise DataError(f"data.path={self.path}: no rows to train on")

    def rows(self, table: "Table") -> Dataset:
        sources.show_progress()
        name = f"seq2seq/{table._fingerprint}/{fingerprint(self.tokenizer)}/{self.seq_len}"
        name = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        encoded = table.map(
            encode_texts,
            batched=True,
            fn_kwargs={"tokenizer": self.tokenizer, "seq_len": self.seq_len},
            new_fingerprint=name,
            cache_file_name=str(cache_folder() / f"seq2seq-{name}.arrow"),
            desc="tokenizing",
        ).with_format("numpy")
        return PackedPairs(encoded, self.seq_len if self.packing else 0)

    def summary(self) -> str:
        train, val = self.tables()
        return f"{self.path}, {len(train):,} pairs for training in {len(self.train_rows):,} rows, {len(val):,} held"

    def prompt(self) -> str:
        return self.tables()[1][0]["source"]


class PackedPairs(Dataset):
    """Rows of pairs of which sources and targets both fit into `room` tokens; one pair a row where it is 0."""

    def __init__(self, pairs: "Table", room: int) -> None:
        self.pairs = pairs
        lengths = [
            max(len(source), len(target)) for source, target in zip(pairs["source"], pairs["target"], strict=True)
        ]
        self.bins = pack(lengths, room) if room else [[n] for n in range(len(pairs))]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Row:
        chosen = [self.pairs[n] for n in self.bins[index]]
        row = {}
        for role in ("source", "target"):
            texts = [pair[role] for pair in chosen]
            row[role] = np.concatenate(texts)
            row[f"{role}_segments"] = np.repeat(np.arange(len(texts)) + 1, [len(text) for text in texts])
        return row
