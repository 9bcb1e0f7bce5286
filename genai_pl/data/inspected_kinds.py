"""Views: the rows of each kind of data as they are tokenized, by the tables and the cached tokens that training reads.

So nothing is shown that a run would not see. Where training keeps truncated tokens alone, the whole texts are tokenized
beside them to show what is cut.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.config.labels import REGRESSION, Labels
from genai_pl.data.chat import ChatDataModule, tokenize_examples
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.inspection import CUT, GIVEN, LEARNED, InspectedRow, Part, states_of
from genai_pl.data.labelled import LabelledDataModule, tokenize_labelled
from genai_pl.data.labels import Cell, label_index
from genai_pl.data.pairs import PairsDataModule, TextsDataModule
from genai_pl.data.preference import PreferenceDataModule, is_ranked, tokenize_preference
from genai_pl.data.prompts import PromptsDataModule, tokenize_prompts
from genai_pl.data.rerank import RerankDataModule, tokenize_rankings
from genai_pl.data.seq2seq import Seq2SeqDataModule
from genai_pl.data.stepwise import StepwiseDataModule
from genai_pl.data.table_datamodule import as_arrays
from genai_pl.data.tags import TagsDataModule
from genai_pl.data.text import TextDataModule
from genai_pl.data.tokenize import tokenize
from genai_pl.data.unpaired import UnpairedDataModule, tokenize_completions
from genai_pl.data.word_tokens import tokenize_words
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset as Table


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
        yield InspectedRow(number, [Part("text", ids, states)], is_empty=not len(ids))


def _chat_rows(data: ChatDataModule, table: "Table") -> Iterator[InspectedRow]:
    roles = [role for role in data.columns if role in table.column_names]
    encoded = data.encode_table(table, data.encoded_roles(table, *roles), tokenize_examples)
    columns = as_arrays(encoded, "input_ids"), as_arrays(encoded, "loss_mask"), table["row"]
    for ids, mask, number in zip(*columns, strict=True):
        states = np.where(mask.view(bool), LEARNED, GIVEN)
        states[:1] = GIVEN  # nothing predicts the first token
        states[data.capacity :] = CUT
        yield _learned(number, [Part("text", ids, states)])


def _preference_rows(data: PreferenceDataModule, table: "Table") -> Iterator[InspectedRow]:
    answers = "completions" if is_ranked(table) else "answers"
    encoded = data.encode_table(table, data.encoded_roles(table, "prompt", answers), tokenize_preference)
    columns = [as_arrays(encoded, name) for name in ("prompt", "completions", "lengths", "counted")]
    for prompt, completions, lengths, counted, number in zip(*columns, table["row"], strict=True):
        kept_prompt, _, kept = data._row(prompt, completions, lengths, counted)
        whole = np.split(completions, lengths.cumsum()[:-1])
        labels = ("chosen", "rejected") if answers == "answers" else [f"rank {n + 1}" for n in range(len(whole))]
        parts = [_ended(label, ids, mask) for label, ids, mask in zip(labels, whole, kept, strict=True)]
        yield _learned(number, [_begun("prompt", prompt, len(kept_prompt)), *parts])


def _unpaired_rows(data: UnpairedDataModule, table: "Table") -> Iterator[InspectedRow]:
    encoded = data.encode_table(table, data.encoded_roles(table, "prompt", "completion"), tokenize_completions)
    columns = (as_arrays(encoded, name) for name in ("prompt", "completion", "counted"))
    for prompt, completion, counted, label, number in zip(*columns, table["label"], table["row"], strict=True):
        kept = data._row(prompt, completion, counted, label)
        mask = kept.get("completion_mask", np.ones(len(kept["completion"]), bool))
        answer = _ended("desirable" if label else "undesirable", completion, mask)
        yield _learned(number, [_begun("prompt", prompt, len(kept["prompt"])), answer])


def _prompt_rows(data: PromptsDataModule, table: "Table") -> Iterator[InspectedRow]:
    """Prompts, of which nothing is learned: the policy answers them; one without tokens is empty."""
    prompts = as_arrays(data.encode_table(table, data.encoded_roles(table, "prompt"), tokenize_prompts), "prompt")
    limit = min(data.max_prompt_len, data.collate.row_length(data.seq_len))
    for ids, number in zip(prompts, table["row"], strict=True):
        yield InspectedRow(number, [_begun("prompt", ids, min(len(ids), limit))], is_empty=not len(ids))


def _texts_rows(data: TextsDataModule, table: "Table", *, learned: Sequence[str] = ()) -> Iterator[InspectedRow]:
    """Texts of which each is read by itself; a row with a blank text is empty. learned: roles of texts that are predicted."""
    kept = data.tokenized_texts(table)
    whole = data.tokenized_texts(table, cut=False)
    roles = list(data.columns)
    states = [LEARNED if role in learned else GIVEN for role in roles]
    columns = [[*zip(as_arrays(whole, role), as_arrays(kept, role), strict=True)] for role in roles]
    texts = zip(*(table[role] for role in roles), strict=True)
    for number, ids, cells in zip(table["row"], zip(*columns, strict=True), texts, strict=True):
        parts = [
            Part(role, all_ids, states_of(all_ids, kept_ids, state))
            for role, (all_ids, kept_ids), state in zip(roles, ids, states, strict=True)
        ]
        yield InspectedRow(number, parts, is_empty=not all(cell.strip() for cell in cells))


def _labelled_rows(data: LabelledDataModule, table: "Table") -> Iterator[InspectedRow]:
    """Texts, or pairs of texts, of which the label is learned."""
    whole, kept = (
        as_arrays(data.encode_table(table, data.text_roles, tokenize_labelled, seq_len=limit), "input_ids")
        for limit in (None, data.seq_len)
    )
    texts = zip(*(table[role] for role in data.text_roles), strict=True)
    columns = table["row"], whole, kept, texts, table["label"]
    for number, ids, kept_ids, cells, label in zip(*columns, strict=True):
        part = Part("text", ids, states_of(ids, kept_ids, GIVEN))
        note = f"label: {label_text(data.fixed_labels, json.loads(label))}"
        yield InspectedRow(number, [part], is_empty=not all(cell.strip() for cell in cells), note=note)


def _ranking_rows(data: RerankDataModule, table: "Table") -> Iterator[InspectedRow]:
    """A query with each of its documents, of which the relevance is learned."""
    whole, kept = (_split_pairs(data, table, limit) for limit in (None, data.seq_len))
    columns = table["row"], whole, kept, table["label"], table["query"]
    for number, pairs, kept_pairs, cell, query in zip(*columns, strict=True):
        labels = [f"relevance {relevance:g}" for relevance in json.loads(cell)]
        parts = [
            Part(label, ids, states_of(ids, kept_ids, GIVEN))
            for label, ids, kept_ids in zip(labels, pairs, kept_pairs, strict=True)
        ]
        yield InspectedRow(number, parts, is_empty=not query.strip())


def _split_pairs(data: RerankDataModule, table: "Table", limit: int | None) -> list[list[np.ndarray]]:
    """The token ids of the pairs of each row."""
    encoded = data.encode_table(table, ["query", "document"], tokenize_rankings, seq_len=limit)
    columns = (as_arrays(encoded, name) for name in ("input_ids", "lengths"))
    return [np.split(ids, lengths.cumsum()[:-1]) for ids, lengths in zip(*columns, strict=True)]


def _tagged_rows(data: TagsDataModule, table: "Table") -> Iterator[InspectedRow]:
    """Sentences, of which the tag is learned at the first token of each word."""
    encoded = data.encode_table(table, ["tokens"], tokenize_words, seq_len=None)
    kept = as_arrays(data.encode_table(table, ["tokens"], tokenize_words, seq_len=data.seq_len), "input_ids")
    columns = as_arrays(encoded, "input_ids"), as_arrays(encoded, "words"), kept, table["row"], table["tokens"]
    for ids, words, kept_ids, number, tokens, tags in zip(*columns, table["tags"], strict=True):
        states = states_of(ids, kept_ids, GIVEN)
        states[(words >= 0) & (states == GIVEN)] = LEARNED
        names = [label_text(data.fixed_labels, tag) for tag in json.loads(tags)]
        note = "tags: " + " ".join(f"{word}/{name}" for word, name in zip(json.loads(tokens), names, strict=True))
        yield _learned(number, [Part("text", ids, states)], note=note)


def _stepwise_rows(data: StepwiseDataModule, table: "Table") -> Iterator[InspectedRow]:
    """Prompts with their steps, of which the label is learned at the last token of each step's separator."""
    encoded = data.encoded_steps(table)
    columns = (as_arrays(encoded, name) for name in ("prompt", "steps", "ends"))
    for prompt, steps, ends, labels, number in zip(*columns, table["labels"], table["row"], strict=True):
        kept, labels = max(data.seq_len - len(prompt), 0), json.loads(labels)
        states = np.where(np.arange(len(steps)) < kept, GIVEN, CUT)
        learned = ends[-1:] if data.train_on_last_step_only else ends
        states[[end - 1 for end in learned if end <= kept]] = LEARNED
        parts = [_ended("prompt", prompt, np.zeros(min(len(prompt), data.seq_len), bool)), Part("steps", steps, states)]
        yield _learned(number, parts, note="labels: " + " ".join(f"{label:g}" for label in labels))


def label_text(labels: Labels, cell: Cell) -> str:
    """The names of a cell's labels, or its numbers.

    >>> label_text(Labels(("bad", "good")), 1), label_text(Labels(("a", "b", "c")), ["a", "c"])
    ('good', 'a, c')
    """
    entries = cell if isinstance(cell, list) else [cell]
    if labels.problem_type == REGRESSION:
        return ", ".join(map(str, entries))
    indices = [label_index(labels, entry) for entry in entries]
    return ", ".join(
        str(entry) if index is None else labels.names[index] for index, entry in zip(indices, entries, strict=True)
    )


def _learned(number: int, parts: list[Part], *, note: str = "") -> InspectedRow:
    """A row that is empty where none of its tokens is learned."""
    return InspectedRow(number, parts, is_empty=not any((part.states == LEARNED).any() for part in parts), note=note)


def _begun(label: str, ids: np.ndarray, kept: int) -> Part:
    """A prompt, of which the last `kept` tokens are given and those before are cut."""
    return Part(label, ids, np.where(np.arange(len(ids)) < len(ids) - kept, CUT, GIVEN))


def _ended(label: str, ids: np.ndarray, counted: np.ndarray) -> Part:
    """An answer of which the end is cut: of its first tokens those are learned that count (k,), all but tools' turns."""
    states = np.full(len(ids), CUT)
    states[: len(counted)] = np.where(counted, LEARNED, GIVEN)
    return Part(label, ids, states)


VIEWS = {
    TextDataModule: _text_rows,
    ChatDataModule: _chat_rows,
    PreferenceDataModule: _preference_rows,
    UnpairedDataModule: _unpaired_rows,
    PromptsDataModule: _prompt_rows,
    PairsDataModule: _texts_rows,
    Seq2SeqDataModule: partial(_texts_rows, learned=("target",)),
    LabelledDataModule: _labelled_rows,
    RerankDataModule: _ranking_rows,
    TagsDataModule: _tagged_rows,
    StepwiseDataModule: _stepwise_rows,
}
