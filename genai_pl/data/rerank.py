"""Reranking data: queries with documents and the relevance of each; one query with its documents, or one pair, per row."""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.config.labels import Labels
from genai_pl.data.columns import Place
from genai_pl.data.labelled import LabelsDataModule
from genai_pl.data.labels import parse_ranking
from genai_pl.data.loader import Collate
from genai_pl.data.records import Record
from genai_pl.data.table_datamodule import as_arrays, report_cut
from genai_pl.data.text_tokens import encode_pairs, separate_pairs
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

RELEVANCE = Labels(("relevance",), pairs=True)


class RerankDataModule(LabelsDataModule):
    """Examples {"pairs": a list of ids, "labels": numbers} of one query, and "types" where the tokenizer makes them.

    query, document, label: names of the columns; documents and labels are lists, or one of each. Rows of one query each are not
    joined. Other arguments: see `TableDataModule`.
    """

    kind = "rerank"
    cell_kinds: ClassVar[dict[str, str]] = {"document": "json", "label": "json"}

    def __init__(self, *, query: str, document: str, label: str, **rest: object) -> None:
        super().__init__(**rest)
        self.columns = {"query": query, "document": document, "label": label}

    def required_columns(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        query, documents, labels = parse_ranking(record, [roles[name] for name in self.columns], place)
        return {"query": query, "document": documents, "label": labels}

    def find_labels(self, known: Labels | None) -> Labels:
        self.fixed_labels = RELEVANCE
        return RELEVANCE

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        separate_pairs(tokenizer)

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        return (text for row in train for text in (row["query"], *json.loads(row["document"])))

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        super().prepare(tokenizer, collate)
        _check_comparable(self.train_rows, listwise=getattr(collate, "listwise", False))

    def rows(self, table: "Table") -> Dataset:
        encoded = self.encode_table(table, ["query", "document"], tokenize_rankings, seq_len=self.seq_len)
        columns = {name: as_arrays(encoded, name) for name in encoded.column_names}
        rows = []
        for n, cell in enumerate(table["label"]):
            ends = columns["lengths"][n].cumsum()[:-1]
            row = {"pairs": np.split(columns["input_ids"][n], ends), "labels": np.asarray(json.loads(cell), np.float32)}
            if "token_type_ids" in columns:
                row["types"] = np.split(columns["token_type_ids"][n], ends)
            rows.append(row)
        report_cut((pair for row in rows for pair in row["pairs"]), self.seq_len)
        return rows

    def summary(self) -> str:
        n = sum(len(row["pairs"]) for row in self.train_rows)
        return f"{self.path}, {len(self.train_rows):,} queries with {n:,} documents for training, {len(self.val_rows):,} held"

    def prompt(self) -> str:
        return self.tables()[1][0]["query"]


def _check_comparable(rows: Iterable[Mapping[str, object]], *, listwise: bool) -> None:
    """DataError where no pair is to get a higher score than another: of all rows, or with `listwise` of one query."""
    labels = [row["labels"] for row in rows]
    if listwise and not any(of_query.max() > of_query.min() for of_query in labels):
        raise DataError(
            "objective.loss=listwise compares the documents of a query, and no row has documents of different relevance: "
            "write a row for each query with a list of documents, or take objective.loss=pointwise"
        )
    flat = np.concatenate(labels)
    if flat.max() == flat.min():
        raise DataError(f"data.label: every document has the relevance {flat[0]:g}, so there is nothing to learn")


def tokenize_rankings(
    batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase", seq_len: int | None
) -> dict[str, list[list[int]]]:
    """Per query: the token ids of all its pairs end to end, their `lengths`, and the types of the tokens if there are any."""
    counts = [len(documents) for documents in batch["document"]]
    queries = [query for query, count in zip(batch["query"], counts, strict=True) for _ in range(count)]
    documents = [document for of_query in batch["document"] for document in of_query]
    encoded = encode_pairs(tokenizer, queries, documents, max_length=seq_len)
    starts = np.cumsum([0, *counts]).tolist()
    ranges = list(pairwise(starts))
    columns = {
        name: [[token for row in rows[a:b] for token in row] for a, b in ranges] for name, rows in encoded.items()
    }
    return {**columns, "lengths": [[len(row) for row in encoded["input_ids"][a:b]] for a, b in ranges]}
