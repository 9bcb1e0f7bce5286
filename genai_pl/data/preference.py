"""Prompts with two completions, of which people preferred one; and prompts alone, to be answered in training."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_list, parse_number
from genai_pl.data.loader import Collate
from genai_pl.data.messages import extract_prompt, message_texts, text_or_messages
from genai_pl.data.messages_datamodule import TOOLS, MessagesDataModule, parse_prompt, tools_argument
from genai_pl.data.prompt_tokens import encode_answers
from genai_pl.data.records import Record
from genai_pl.data.table_datamodule import as_arrays
from genai_pl.data.tokenizer import train_bpe
from genai_pl.errors import ConfigError, DataError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(MessagesDataModule):
    """Rows of token ids: prompt, chosen, rejected, and a margin where there is one; or prompt and completions, ranked."""

    kind = "preference"
    cell_kinds: ClassVar[dict[str, str]] = {**MessagesDataModule.cell_kinds, "completions": "json", "margin": "number"}

    def __init__(
        self, *, prompt: str, chosen: str, rejected: str, completions: str, margin: str | None, **rest: object
    ) -> None:
        super().__init__(**rest)
        self.columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        self.columns |= {"margin": margin} if margin else {}
        self.ranking_columns = {"prompt": prompt, "completions": completions}

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        answers = ("completions", None) if is_ranked(train) else ("answers", 1)  # what was rejected is nothing to learn
        parts = (
            part for row in train for part in (json.loads(row["prompt"]), *json.loads(row[answers[0]])[: answers[1]])
        )
        return train_bpe((text for part in parts for text in message_texts(part)), vocab_size)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        if is_ranked(self.tables()[0]) and not collate.ranks:
            raise ConfigError(
                f"data.path={self.path}: ranked completions are for objective=reward; give pairs, chosen and rejected"
            )
        super().prepare(tokenizer, collate)

    def roles(self, source: sources.Source, found: Sequence[str]) -> dict[str, str]:
        """The columns that are there, by role: those of pairs, or prompt and ranked completions.

        Pairs need no prompt: it is then what both answers begin with.
        """
        ranked = self.ranking_columns["completions"] in found and self.columns["chosen"] not in found
        roles = dict(self.ranking_columns if ranked else self.columns)
        if not ranked and roles["prompt"] == "prompt" and "prompt" not in found and roles["chosen"] in found:
            del roles["prompt"]
        sources.check_columns(source, found, {f"data.{role}": column for role, column in roles.items()})
        return roles

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
        answers = "completions" if "completions" in roles else "answers"
        return ["prompt", answers, *(role for role in roles if role == "margin"), TOOLS]

    def example(self, row: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        prompt = parse_prompt(row, roles["prompt"], place) if "prompt" in roles else None
        columns = {role: place._replace(column=column) for role, column in roles.items()}
        if "completions" in roles:
            answers = parse_list(row.get(roles["completions"]), columns["completions"], text_or_messages)
        else:
            answers = [text_or_messages(row.get(roles[role]), columns[role]) for role in ("chosen", "rejected")]
        if len(answers) < 2:
            raise DataError(f"{place}: a prompt with {len(answers)} completions has nothing to compare")
        prompt, answers = extract_prompt(prompt, answers, place)
        margin = {"margin": parse_number(row.get(roles["margin"]), columns["margin"])} if "margin" in roles else {}
        return {"prompt": prompt, "completions" if "completions" in roles else "answers": answers, **margin}

    def rows(self, table: "Table") -> Dataset:
        answers = "completions" if is_ranked(table) else "answers"
        found = self.encode_table(table, self.encoded_roles(table, "prompt", answers), tokenize_preference)
        rows = map(self._row, as_arrays(found, "prompt"), as_arrays(found, "completions"), as_arrays(found, "lengths"))
        if is_ranked(table):
            return [{"prompt": prompt, "completions": said} for prompt, said in rows]
        pairs = [{"prompt": prompt, "chosen": said[0], "rejected": said[1]} for prompt, said in rows]
        if "margin" not in table.column_names:
            return pairs
        return [{**pair, "margin": margin} for pair, margin in zip(pairs, table["margin"], strict=True)]

    def _row(self, prompt: np.ndarray, said: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The longest completion is cut to half of the row at most, the prompt on its left to what is left."""
        kept = min(sizes.max(), max(self.seq_len // 2, self.seq_len - len(prompt)))
        completions = [ids[:kept] for ids in np.split(said, sizes.cumsum()[:-1])]
        return prompt[max(len(prompt) + kept - self.seq_len, 0) :], completions

    def prompt(self) -> str:
        return self.render(json.loads(self.tables()[1][0]["prompt"]))


def is_ranked(table: "Table") -> bool:
    """Whether any number of completions is compared, the best first."""
    return "completions" in table.column_names


def tokenize_preference(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt, of its completions end to end, and how many each of them has."""
    given = batch["completions"] if "completions" in batch else batch["answers"]
    rows = encode_answers(tokenizer, batch["prompt"], given, **tools_argument(batch))
    return {
        "prompt": [prompt for prompt, _ in rows],
        "completions": [np.concatenate([*answers, np.zeros(0, np.int32)]) for _, answers in rows],
        "lengths": [np.asarray([len(ids) for ids in answers], dtype=np.int32) for _, answers in rows],
    }
