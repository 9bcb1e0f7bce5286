"""Text data: documents are read, split, tokenized and packed once, or streamed.

Documents are concatenated and divided into rows without padding (`PackedRows`), and each row numbers its documents, so
none sees another. Validation is the end of the text by characters rather than random rows, so that it shares no document
with the training.
"""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from torch.utils.data import ConcatDataset, Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_text
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.duplicates import check_mode, without_duplicates
from genai_pl.data.loader import Collate, EpochLoader
from genai_pl.data.packing import PackedRows, Packer
from genai_pl.data.streaming import BatchStream, StreamLoader
from genai_pl.data.tokenize import n_characters, split_text, tokenize
from genai_pl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from datasets import IterableDataset as IterableTable
    from transformers import PreTrainedTokenizerBase


class TextDataModule(RowsDataModule):
    """Training and validation batches of packed text.

    path: the documents (`sources.find_source`). val_path: those of the validation, or None for the last `val_fraction` of
        all characters.
    column: the column of texts, where the source has columns.
    seq_len: tokens that the model reads of a row.
    streaming: tokenize while training; then the first `val_documents` documents validate, and rows are shuffled in blocks
        of `block_rows`.
    separate_documents: tokens attend to their own document only.
    deduplicate: None, or `exact` or `near`: documents that repeat an earlier one are left out.
    batch_size, val_batch_size, workers, shuffle, seed: see `RowsDataModule`.
    """

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None,
        val_fraction: float,
        column: str,
        seq_len: int,
        batch_size: int,
        val_batch_size: int | None,
        workers: int,
        shuffle: bool,
        streaming: bool,
        block_rows: int,
        val_documents: int,
        separate_documents: bool,
        seed: int,
        deduplicate: str | None = None,
    ) -> None:
        super().__init__(
            seq_len=seq_len,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            workers=workers,
            shuffle=shuffle,
            seed=seed,
        )
        self.path, self.val_path, self.val_fraction, self.column = path, val_path, val_fraction, column
        self.streaming, self.block_rows, self.val_documents = streaming, block_rows, val_documents
        self.separate_documents, self.deduplicate = separate_documents, deduplicate
        check_mode(deduplicate)
        if deduplicate and streaming:
            raise ConfigError(f"data.deduplicate={deduplicate}: a stream is read once; leave it out, or data.streaming")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must lie between 0 and 1, not {val_fraction}")
        # sources are looked up now, so that a wrong path fails before a model is built
        self.source = sources.find_source(path)
        self.val_source = (
            sources.find_source(val_path, option="data.val_path") if val_path else sources.shipped_validation(path)
        )
        self._tables: tuple[Table, Table] | None = None

    def documents(self) -> tuple["Table", "Table"]:
        """Training and validation documents; with streaming, the former are an iterable."""
        if self._tables is None:
            table = sources.read_documents(self.source, self.column, streaming=self.streaming)
            if self.deduplicate:
                table = without_duplicates(table, self.deduplicate, name=self.path)
            if self.val_source:
                self._tables = table, sources.read_documents(self.val_source, self.column)
            elif self.streaming:
                from datasets import Dataset

                # the first documents of a stream validate, the others train
                first = self._first(table, self.val_documents + 1)
                if len(first) <= self.val_documents:
                    raise DataError(
                        f"data.val_documents={self.val_documents}: {self.path} has {len(first)} documents, so none is left "
                        "to train on; lower it or set data.val_path"
                    )
                self._tables = table.skip(self.val_documents), Dataset.from_dict({"text": first[: self.val_documents]})
            else:
                self._tables = split_text(table, self.val_fraction)
        return self._tables

    def training_texts(self) -> Iterable[str]:
        """The training documents; of a stream, its first 20,000."""
        table, _ = self.documents()
        return self._first(table, 20_000) if self.streaming else (example["text"] for example in table)

    def _first(self, table: "IterableTable", n: int) -> list[str]:
        """The first n texts of a stream."""
        rows = enumerate(table.take(n), start=1)
        return [parse_text(row["text"], Place(self.path, number, self.column)) for number, row in rows]

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        """Tokenize and pack both parts; the validation keeps its incomplete last row."""
        self.tokenizer, self.collate = tokenizer, collate
        # rows as the objective needs them: length, and overlap of neighbours
        self.packing = {"overlap": collate.overlap, "separate": self.separate_documents}
        self.row_length = collate.row_length(self.seq_len)
        train, val = self.documents()
        if not self.streaming:
            self.train_rows = self._rows(train, self.source, "train")
            if not len(self.train_rows):
                raise DataError(
                    f"data.path={self.path}: {self.train_rows.n_tokens} tokens are too few for one row of "
                    f"{self.row_length}; give more text or lower model.max_seq_len"
                )
        # every token of the validation counts, so its last row may be shorter
        packed = self._rows(val, self.val_source or self.source, f"val/{self.val_fraction}/{self.val_documents}")
        tail = packed.tail()
        self.n_val_tokens = packed.n_tokens
        self.val_rows: Dataset = ConcatDataset([packed, [tail]]) if tail else packed
        if not len(self.val_rows):
            raise DataError(f"data.path={self.path}: no text is left for validation; set data.val_path")

    def _rows(self, table: "Table", source: sources.Source, part: str) -> PackedRows:
        """The packed rows of a table, tokenized under a cache name of source and part.

        A part that does not depend on the split is called "all", so that other fractions reuse its tokens.
        """
        split = part if source is self.source and not (part == "train" and self.val_source) else "all"
        fraction = self.val_fraction if split != "all" else ""
        without = [self.deduplicate] if self.deduplicate and source is self.source else []
        content = sources.cache_name(source, self.column, split, fraction, *without)
        return PackedRows(tokenize(table, self.tokenizer, content=content), self.row_length, **self.packing)

    def summary(self) -> str:
        """One line about the data: source, characters and tokens."""
        if self.streaming:
            return f"{self.path}, streamed, rows of {self.seq_len} tokens"
        train, val = self.documents()
        return (
            f"{self.path}, {n_characters(train):,} characters = {self.train_rows.n_tokens:,} tokens for training, "
            f"{n_characters(val):,} = {self.n_val_tokens:,} for validation"
        )

    def prompt(self) -> str:
        """The first words of the validation text."""
        _, val = self.documents()
        lines = [line.strip() for line in val[0]["text"][:2000].splitlines()]
        return " ".join(next((line for line in lines if len(line) >= 4), "").split()[:6])

    def train_dataloader(self) -> EpochLoader | StreamLoader:
        return StreamLoader(self.stream(), self.n_batches) if self.streaming else super().train_dataloader()

    def stream(self) -> BatchStream:
        """The training documents as an endless stream of batches."""
        plan = self.batch_plan()
        train, _ = self.documents()
        return BatchStream(
            train,
            self.tokenizer,
            self.collate,
            plan,
            build_packer=partial(Packer, self.row_length, **self.packing),
            block_rows=self.block_rows if self.shuffle else plan.batch_size,
            continuous=self.source.is_text,
        )
