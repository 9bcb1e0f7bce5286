"""Tagged data: sentences of words with a tag each, for token classification; tags are names (BIO) or numbers of names."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.config.labels import Labels
from genai_pl.data.columns import Place, parse_list, parse_text, refuse
from genai_pl.data.labelled import LabelsDataModule
from genai_pl.data.labels import encode_label, find_labels, parse_label_cell
from genai_pl.data.records import Record
from genai_pl.data.sources import locate_row
from genai_pl.data.table_datamodule import as_arrays, report_cut
from genai_pl.data.word_tokens import tokenize_words
from genai_pl.errors import DataError
from genai_pl.objectives.token_loss import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset as Table


class TagsDataModule(LabelsDataModule):
    """Examples {"input_ids": ids, "labels": tags}, -100 where no word begins.

    tokens, tags: names of the columns, lists of equal length. labels: names of the tags in order, None for those in the data.
    Other arguments: see `TableDataModule`.
    """

    kind = "tags"
    cell_kinds: ClassVar[dict[str, str]] = {"tokens": "json", "tags": "json"}

    def __init__(self, *, tokens: str, tags: str, labels: list[str] | None, **rest: object) -> None:
        super().__init__(**rest)
        self.columns, self.labels = {"tokens": tokens, "tags": tags}, labels

    def required_columns(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        words = parse_list(record.get(roles["tokens"]), place.at(roles["tokens"]), parse_text)
        tags_place = place.at(roles["tags"])
        tags = parse_list(record.get(roles["tags"]), tags_place, parse_label_cell)
        if len(words) != len(tags):
            refuse(tags_place, f"{len(tags)} tags for {len(words)} words: give each word one")
        return {"tokens": words, "tags": tags}

    def find_labels(self, known: Labels | None) -> Labels:
        tags = {tag for table in self.tables() for cell in table["tags"] for tag in json.loads(cell)}
        single = "single_label_classification"
        found = find_labels(sorted(tags, key=str), names=self.labels, problem_type=single, known=known)
        self.fixed_labels = found._replace(problem_type=None)  # a key for labels of texts
        return self.fixed_labels

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        return (" ".join(json.loads(row["tokens"])) for row in train)

    def rows(self, table: "Table") -> Dataset:
        encoded = self.encode_table(table, ["tokens"], tokenize_words, seq_len=self.seq_len)
        ids, words = as_arrays(encoded, "input_ids"), as_arrays(encoded, "words")
        report_cut(ids, self.seq_len)
        rows = []
        for number, cell, row, of_token in zip(table["row"], table["tags"], ids, words, strict=True):
            try:
                tags = [int(encode_label(self.fixed_labels, tag)[0]) for tag in json.loads(cell)]
            except DataError as error:
                raise DataError(f"{locate_row(self.source_of(table), number)}: {error}") from None
            rows.append({"input_ids": row, "labels": np.array([*tags, IGNORED])[of_token]})  # -1: no word begins
        return rows

    def summary(self) -> str:
        names = self.fixed_labels.names
        shown = ", ".join(names[:9]) + (f" and {len(names) - 9} more" if len(names) > 9 else "")
        return (
            f"{self.path}, {len(self.train_rows):,} sentences for training, {len(self.val_rows):,} held; tags: {shown}"
        )

    def prompt(self) -> str:
        return " ".join(json.loads(self.tables()[1][0]["tokens"]))
