"""Inspection: rows of a data module as they are tokenized, with what is learned, what is given and what is cut.

It reads the tables and the cached tokens that training reads, so nothing is shown that a run would not see.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from genai_pl.data.chat import ChatDataModule, tokenize_examples
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.preference import PreferenceDataModule, is_ranked, tokenize_preference
from genai_pl.data.prompts import PromptsDataModule, tokenize_prompts
from genai_pl.data.table_datamodule import as_arrays
from genai_pl.data.text import TextDataModule
from genai_pl.data.tokenize import tokenize
from genai_pl.data.unpaired import UnpairedDataModule, tokenize_completions
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset as Table

GIVEN, LEARNED, CUT = 0, 1, 2  # what becomes of a token


class Part(NamedTuple):
    """A labelled sequence of tokens of a row: token ids (n,), and for each GIVEN, LEARNED or CUT, (n,)."""

    label: str
    ids: np.ndarray
    states: np.ndarray


class InspectedRow(NamedTuple):
    """A row: its number in the source, counted from 1 (0 where it has none), and its parts."""

    number: int
    parts: list[Part]

    @property
    def length(self) -> int:
        """Tokens of the row before anything is cut: of its prompt with the longest of its answers."""
        prompt = sum(len(part.ids) for part in self.parts if part.label == "prompt")
        return prompt + max((len(part.ids) for part in self.parts if part.label != "prompt"), default=0)

    @property
    def is_cut(self) -> bool:
        return any((part.states == CUT).any() for part in self.parts)

    @property
    def learns(self) -> bool:
        """Whether a token of the row is learned, or a prompt without answers is there to be continued."""
        if all(part.label == "prompt" for part in self.parts):
            return self.length > 0
        return any((part.states == LEARNED).any() for part in self.parts)


@dataclass
class Counts:
    """What was counted over all rows: lengths in tokens, rows that are cut, empty or duplicated, tokens by their state."""

    lengths: list[int] = field(default_factory=list)
    cut: int = 0
    empty: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))
    first_cut: int = 0
    first_empty: int = 0

    def add(self, row: InspectedRow) -> None:
        """Count a row."""
        self.lengths.append(row.length)
        if row.is_cut:
            self.cut, self.first_cut = self.cut + 1, min(self.first_cut or row.number, row.number)
        if not row.learns:
            self.empty, self.first_empty = self.empty + 1, min(self.first_empty or row.number, row.number)
        for part in row.parts:
            self.tokens += np.bincount(part.states, minlength=3)


def inspected_rows(data: RowsDataModule, table: "Table") -> Iterator[InspectedRow]:
    """The rows of a table of a prepared data module, in its order; ConfigError for kinds without a view."""
    for kind, view in VIEWS.items():
        if isinstance(data, kind):
            return view(data, table)
    known = ", ".join(kind.kind for kind in VIEWS)
    raise ConfigError(f"data={data.kind} has no view of its rows; those of {known} have one")


def _text_rows(data: TextDataModule, table: "Table") -> Iterator[InspectedRow]:
    """Documents, of which every token is learned; rows of them are packed without a cut."""
    documents = as_arrays(tokenize(table, data.tokenizer, content=f"inspect/{table._fingerprint}"), "input_ids")
    for number, ids in enumerate(documents, start=1):
        states = np.full(len(ids), LEARNED)
        yield InspectedRow(number, [Part("text", ids, states)])


def _chat_rows(data: ChatDataModule, table: "Table") -> Iterator[InspectedRow]:
    roles = [role for role in data.columns if role in table.column_names]
    encoded = data.encode_table(table, data.encoded_roles(table, *roles), tokenize_examples)
    columns = as_arrays(encoded, "input_ids"), as_arrays(encoded, "loss_mask"), table["row"]
    for ids, mask, number in zip(*columns, strict=True):
        states = np.where(mask.view(bool), LEARNED, GIVEN)
        states[:1] = GIVEN  # nothing predicts the first token
        states[data.capacity :] = CUT
        yield InspectedRow(number, [Part("text", ids, states)])


def _preference_rows(data: PreferenceDataModule, table: "Table") -> Iterator[InspectedRow]:
    answers = "completions" if is_ranked(table) else "answers"
    encoded = data.encode_table(table, data.encoded_roles(table, "prompt", answers), tokenize_preference)
    columns = [as_arrays(encoded, name) for name in ("prompt", "completions", "lengths")]
    for prompt, completions, lengths, number in zip(*columns, table["row"], strict=True):
        kept_prompt, kept = data._row(prompt, completions, lengths)
        whole = np.split(completions, lengths.cumsum()[:-1])
        labels = ("chosen", "rejected") if answers == "answers" else [f"rank {n + 1}" for n in range(len(whole))]
        parts = [_ended(label, ids, len(rest)) for label, ids, rest in zip(labels, whole, kept, strict=True)]
        yield InspectedRow(number, [_begun("prompt", prompt, len(kept_prompt)), *parts])


def _unpaired_rows(data: UnpairedDataModule, table: "Table") -> Iterator[InspectedRow]:
    encoded = data.encode_table(table, data.encoded_roles(table, "prompt", "completion"), tokenize_completions)
    columns = as_arrays(encoded, "prompt"), as_arrays(encoded, "completion"), table["label"], table["row"]
    for prompt, completion, label, number in zip(*columns, strict=True):
        kept = data._row(prompt, completion, label)
        answer = _ended("desirable" if label else "undesirable", completion, len(kept["completion"]))
        yield InspectedRow(number, [_begun("prompt", prompt, len(kept["prompt"])), answer])


def _prompt_rows(data: PromptsDataModule, table: "Table") -> Iterator[InspectedRow]:
    """Prompts, of which nothing is learned: the policy answers them; one without tokens is empty."""
    prompts = as_arrays(data.encode_table(table, data.encoded_roles(table, "prompt"), tokenize_prompts), "prompt")
    limit = min(data.max_prompt_len, data.collate.row_length(data.seq_len))
    for ids, number in zip(prompts, table["row"], strict=True):
        yield InspectedRow(number, [_begun("prompt", ids, min(len(ids), limit))])


def _begun(label: str, ids: np.ndarray, kept: int) -> Part:
    """A prompt, of which the last `kept` tokens are given and those before are cut."""
    return Part(label, ids, np.where(np.arange(len(ids)) < len(ids) - kept, CUT, GIVEN))


def _ended(label: str, ids: np.ndarray, kept: int) -> Part:
    """An answer, of which the first `kept` tokens are learned and those after are cut."""
    return Part(label, ids, np.where(np.arange(len(ids)) < kept, LEARNED, CUT))


VIEWS = {
    TextDataModule: _text_rows,
    ChatDataModule: _chat_rows,
    PreferenceDataModule: _preference_rows,
    UnpairedDataModule: _unpaired_rows,
    PromptsDataModule: _prompt_rows,
}


def runs_of(states: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(state, start, stop) of each run of equal states.

    >>> list(runs_of(np.array([0, 0, 1])))
    [(0, 0, 2), (1, 2, 3)]
    """
    borders: Sequence[int] = [0, *(np.flatnonzero(np.diff(states)) + 1), len(states)]
    for start, stop in pairwise(borders):
        if start < stop:
            yield int(states[start]), int(start), int(stop)
