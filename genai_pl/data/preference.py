"""Preference data: prompts with a chosen and a rejected completion, or with completions ranked from best to worst.

Long rows are shortened so that both completions keep the same prompt and the same limit: completions are limited to half
of the row, or to what the prompt leaves if that is more, and the prompt is truncated on its left. A pair that differed in
its prompt would teach more than the preference.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_list, parse_number, parse_text
from genai_pl.data.formats import AUTO, TOOLS, is_dialogue, parse_dialogue, parse_prompt
from genai_pl.data.loader import Collate
from genai_pl.data.messages import (
    TextOrMessages,
    extract_prompt,
    message_texts,
    parse_message,
    parse_messages,
    text_or_messages,
)
from genai_pl.data.messages_datamodule import MessagesDataModule, tools_argument
from genai_pl.data.prompt_tokens import encode_masked_answers
from genai_pl.data.records import Record
from genai_pl.data.table_datamodule import as_arrays
from genai_pl.errors import ConfigError, DataError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(MessagesDataModule):
    """Examples of token ids: {"prompt", "chosen", "rejected"} and a "margin" where there is one, or {"prompt", "completions"}.

    prompt, chosen, rejected: columns of pairs. Without a column `prompt` it is the common prefix of both answers.
    completions: column of a list of completions, best first; read where the source has it and no `chosen`.
    margin: column of a number by which the chosen completion is better, or None.
    Other arguments: see `TableDataModule`.
    """

    kind = "preference"
    cell_kinds: ClassVar[dict[str, str]] = {**MessagesDataModule.cell_kinds, "completions": "json", "margin": "number"}

    def __init__(
        self, *, prompt: str, chosen: str, rejected: str, completions: str, margin: str | None, **rest: object
    ) -> None:
        super().__init__(**rest)
        self.columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        self.columns |= {"margin": margin} if margin else {}
        self.ranking_columns = {"prompt": prompt, "completions": completions}

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        answers = ("completions", None) if is_ranked(train) else ("answers", 1)  # rejected answers are no text to learn
        values = (
            value for row in train for value in (json.loads(row["prompt"]), *json.loads(row[answers[0]])[: answers[1]])
        )
        return (text for value in values for text in message_texts(value))

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        if is_ranked(self.tables()[0]) and not collate.ranks:
            raise ConfigError(
                f"data.path={self.path}: ranked completions are for objective=reward; give pairs, chosen and rejected"
            )
        super().prepare(tokenizer, collate)

    def roles(self, source: sources.Source, names: Sequence[str]) -> dict[str, str]:
        """The columns to read, by role: those of pairs, prompt and ranked completions, or the two texts of HH."""
        # what the user has named must be there: without a prompt another format would fit
        named = {role: column for role, column in self.columns.items() if column != role}
        sources.check_columns(source, names, {f"data.{role}": column for role, column in named.items()})
        roles = self.recognized(source, names, {**self.columns, **self.ranking_columns})
        if self.format == AUTO and roles.keys() == {"chosen", "rejected"}:
            _, first = next(sources.read_records(source, set(roles.values())), (None, {}))
            if all(is_dialogue(first.get(column)) for column in roles.values()):
                roles = {f"{role}_turns": column for role, column in roles.items()}
        return roles | ({"margin": self.columns["margin"]} if "margin" in self.columns else {})

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
        answers = "completions" if "completions" in roles else "answers"
        return ["prompt", answers, *(role for role in roles if role == "margin"), TOOLS]

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        places = {role: place.at(column) for role, column in roles.items()}
        prompt = parse_prompt(record, roles["prompt"], place) if "prompt" in roles else None
        if "conversations" in roles:
            prompt = parse_messages(record.get(roles["conversations"]), places["conversations"])
        # the answers: texts of turns, a list of any length, or two columns
        if "chosen_turns" in roles:
            before = record.get(roles["prompt_turns"]) if "prompt_turns" in roles else ""
            texts = [record.get(roles[role]) for role in ("chosen_turns", "rejected_turns")]
            at = [places[role] for role in ("chosen_turns", "rejected_turns")]
            whole = [parse_text(before, place) + parse_text(text, spot) for text, spot in zip(texts, at, strict=True)]
            answers = [parse_dialogue(text, spot) for text, spot in zip(whole, at, strict=True)]
        elif "completions" in roles:
            answers = parse_list(record.get(roles["completions"]), places["completions"], text_or_messages)
        else:
            answers = [_answer(record.get(roles[role]), places[role]) for role in ("chosen", "rejected")]
        if len(answers) < 2:
            raise DataError(f"{place}: a prompt with {len(answers)} completions has nothing to compare")
        # whole conversations are divided into prompt and answers
        prompt, answers = extract_prompt(prompt, answers, place)
        margin = {"margin": parse_number(record.get(roles["margin"]), places["margin"])} if "margin" in roles else {}
        return {"prompt": prompt, "completions" if "completions" in roles else "answers": answers, **margin}

    def rows(self, table: "Table") -> Dataset:
        answers = "completions" if is_ranked(table) else "answers"
        encoded = self.encode_table(table, self.encoded_roles(table, "prompt", answers), tokenize_preference)
        names = ("prompt", "completions", "lengths", "counted")
        rows = map(self._row, *(as_arrays(encoded, name) for name in names))
        if is_ranked(table):
            return [{"prompt": prompt, "completions": completions} for prompt, completions, _ in rows]
        pairs = [
            {"prompt": prompt, "chosen": completions[0], "rejected": completions[1], **_masks(counted)}
            for prompt, completions, counted in rows
        ]
        if "margin" not in table.column_names:
            return pairs
        return [{**pair, "margin": margin} for pair, margin in zip(pairs, table["margin"], strict=True)]

    def _row(
        self, prompt: np.ndarray, completions: np.ndarray, lengths: np.ndarray, counted: np.ndarray
    ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """The prompt and the completions of a row with their masks, truncated together to seq_len tokens.

        completions, counted: token ids and masks of all completions end to end; lengths: of each. Completions are limited to
        half of the row, or to what the prompt leaves; the prompt loses its beginning.
        """
        limit = min(lengths.max(), max(self.seq_len // 2, self.seq_len - len(prompt)))
        ends = lengths.cumsum()[:-1]
        truncated, masks = ([part[:limit] for part in np.split(whole, ends)] for whole in (completions, counted))
        return prompt[max(len(prompt) + limit - self.seq_len, 0) :], truncated, [mask.view(bool) for mask in masks]

    def prompt(self) -> str:
        return self.render(json.loads(self.tables()[1][0]["prompt"]))


def _masks(counted: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The masks of a pair by name, where some tokens do not count: those of tools' turns."""
    return {} if all(mask.all() for mask in counted) else {"chosen_mask": counted[0], "rejected_mask": counted[1]}


def _answer(value: object, place: Place) -> TextOrMessages:
    """A text, messages, or one message, which ShareGPT's sets write without a list."""
    return [parse_message(value, place)] if isinstance(value, Mapping) else text_or_messages(value, place)


def is_ranked(table: "Table") -> bool:
    """Whether the table holds lists of completions, best first, rather than pairs."""
    return "completions" in table.column_names


def tokenize_preference(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt, of its completions end to end, the length of each, and which of their tokens count."""
    completions = batch["completions"] if "completions" in batch else batch["answers"]
    rows = encode_masked_answers(tokenizer, batch["prompt"], completions, **tools_argument(batch))
    empty = np.zeros(0, np.int32)
    return {
        "prompt": [prompt for prompt, _ in rows],
        "completions": [np.concatenate([*(answer.input_ids for answer in answers), empty]) for _, answers in rows],
        "lengths": [np.asarray([len(answer.input_ids) for answer in answers], dtype=np.int32) for _, answers in rows],
        # as bytes: arrow packs booleans into bits, which no array can map
        "counted": [
            np.concatenate([*(answer.loss_mask.view(np.uint8) for answer in answers), empty.astype(np.uint8)])
            for _, answers in rows
        ],
    }
