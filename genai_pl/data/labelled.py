"""Labelled data: texts, or pairs of texts, with a class, several labels or numbers, for classification and regression."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.config.labels import REGRESSION, Labels
from genai_pl.data.columns import Place, parse_text
from genai_pl.data.labels import Cell, encode_label, find_labels, label_index, parse_label_cell
from genai_pl.data.records import Record
from genai_pl.data.sources import locate_row
from genai_pl.data.table_datamodule import TableDataModule, as_arrays, report_cut
from genai_pl.data.text_tokens import encode_pairs, separate_pairs
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class LabelsDataModule(TableDataModule):
    """The base of data with a column of labels, which decide the outputs of the model's head.

    labels: names of the outputs in order; None finds them. `find_labels` comes before `prepare`, as the head is made of them.
    """

    fixed_labels: Labels

    def find_labels(self, known: Labels | None) -> Labels:
        """The labels of both tables. known: those of the model's head, if it has one, which stay where they cover the data."""
        raise NotImplementedError

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Complete a tokenizer for rows of this kind; a hook for subclasses."""


class LabelledDataModule(LabelsDataModule):
    """Examples {"input_ids": ids, "target": numbers}, and "token_type_ids" of pairs where the tokenizer makes them.

    text, text_pair, label: names of the columns; text_pair=None reads single texts. labels: names of the labels in order, None
    for those in the data. problem_type: in transformers' words, None: by the labels. Other arguments: see `TableDataModule`.
    """

    kind = "labelled"
    cell_kinds: ClassVar[dict[str, str]] = {"label": "json"}

    def __init__(
        self,
        *,
        text: str,
        text_pair: str | None,
        label: str,
        labels: list[str] | None,
        problem_type: str | None,
        **rest: object,
    ) -> None:
        super().__init__(**rest)
        columns = {"text": text, "text_pair": text_pair, "label": label}
        self.columns = {role: column for role, column in columns.items() if column is not None}
        self.text_roles = [role for role in self.columns if role != "label"]
        self.labels, self.problem_type = labels, problem_type

    def required_columns(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        texts = {role: parse_text(record.get(roles[role]), place.at(roles[role])) for role in self.text_roles}
        column = roles["label"]
        return {**texts, "label": parse_label_cell(record.get(column), place.at(column))}

    def find_labels(self, known: Labels | None) -> Labels:
        train, held = ([json.loads(cell) for cell in table["label"]] for table in self.tables())
        found = find_labels(train + held, names=self.labels, problem_type=self.problem_type, known=known)
        self.fixed_labels = found._replace(pairs="text_pair" in self.columns)
        self._report_unlearned(train)
        return self.fixed_labels

    def _report_unlearned(self, cells: Sequence[Cell]) -> None:
        """Log the labels that no training row has, such as those that only validation data name."""
        labels = self.fixed_labels
        if labels.problem_type == REGRESSION:
            return
        entries = {entry for cell in cells for entry in (cell if isinstance(cell, list) else [cell])}
        found = {label_index(labels, entry) for entry in entries}
        if unlearned := [name for n, name in enumerate(labels.names) if n not in found]:
            log.warning("labels      no training row has %s: nothing teaches it", ", ".join(unlearned[:10]))

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if "text_pair" in self.columns:
            separate_pairs(tokenizer)

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        return (row[role] for row in train for role in self.text_roles)

    def label_targets(self) -> np.ndarray:
        """Targets of the training rows, (N, 1 or n_labels), by which classes may be weighted."""
        return self._targets(self.tables()[0])

    def rows(self, table: "Table") -> Dataset:
        encoded = self.encode_table(table, self.text_roles, tokenize_labelled, seq_len=self.seq_len)
        columns = {name: as_arrays(encoded, name) for name in encoded.column_names}
        report_cut(columns["input_ids"], self.seq_len)
        columns["target"] = list(self._targets(table))
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _targets(self, table: "Table") -> np.ndarray:
        """The targets of a table's rows, (N, 1 or n_labels); DataError names the row of a label that is unknown."""
        targets = []
        for number, cell in zip(table["row"], table["label"], strict=True):
            try:
                targets.append(encode_label(self.fixed_labels, json.loads(cell)))
            except DataError as error:
                raise DataError(f"{locate_row(self.source_of(table), number)}: {error}") from None
        return np.asarray(targets, dtype=np.float32)

    def summary(self) -> str:
        names = self.fixed_labels.names
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        kind = self.fixed_labels.problem_type.replace("_", " ")
        rows = f"{len(self.train_rows):,} rows for training, {len(self.val_rows):,} held"
        return f"{self.path}, {rows}; {kind}: {shown}"

    def prompt(self) -> str:
        return self.tables()[1][0][self.text_roles[-1]]


def tokenize_labelled(
    batch: dict[str, list[str]], tokenizer: "PreTrainedTokenizerBase", seq_len: int | None
) -> dict[str, list[list[int]]]:
    """Token ids of each text or pair, at most seq_len, and the types of a pair's tokens where the tokenizer makes them."""
    return encode_pairs(tokenizer, batch["text"], batch.get("text_pair"), max_length=seq_len)
