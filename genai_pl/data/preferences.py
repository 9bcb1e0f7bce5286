"""Prompts with two completions, of which people preferred one; and prompts alone, to be answered in training."""

import logging
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.chat import encode_answers, encode_prompts
from genai_pl.data.loader import Collate, Plan
from genai_pl.data.table import TableDataModule, lists
from genai_pl.data.tokenizer import train_bpe
from genai_pl.errors import ConfigError, DataError

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(TableDataModule):
    """Rows of token ids: prompt, chosen, rejected, and a margin where there is one; or prompt and completions, ranked."""

    kind = "preference"

    def __init__(
        self, *, prompt: str, chosen: str, rejected: str, completions: str, margin: str | None, **rest: object
    ) -> None:
        super().__init__(**rest)
        self.columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        self.columns |= {"margin": margin} if margin else {}
        self.ranking = {"prompt": prompt, "completions": completions}

    def wanted(self) -> dict[str, str]:
        return {}  # which ones, depends on what is there

    def conversation_columns(self) -> list[str]:
        return list(self.columns.values())

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        roles = self._roles(train)
        texts = (text for row in train for role in ("prompt", "chosen", "completions") if role in roles
                 for text in _listed(row[roles[role]]) if isinstance(text, str))  # fmt: skip
        return train_bpe(texts, vocab_size)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        if "completions" in self._roles(self.tables()[0]) and not collate.ranks:
            raise ConfigError(
                f"data.path={self.path}: ranked completions are for objective=reward; give pairs, chosen and rejected"
            )
        super().prepare(tokenizer, collate)

    def _roles(self, table: "Table") -> dict[str, str]:
        """The columns that are there, by role: those of pairs, or prompt and ranked completions."""
        found = table.column_names
        ranked = self.ranking["completions"] in found and self.columns["chosen"] not in found
        roles = self.ranking if ranked else self.columns
        sources.check_columns(self.source, table, {f"data.{role}": column for role, column in roles.items()})
        return roles

    def rows(self, table: "Table") -> Dataset:
        roles = self._roles(table)
        texts = {role: column for role, column in roles.items() if role != "margin"}
        found = self.encoded(table, texts, encode_compared)
        rows = map(self._row, lists(found, "prompt"), lists(found, "said"), lists(found, "sizes"))
        if "completions" in roles:
            return [{"prompt": prompt, "completions": said} for prompt, said in rows]
        pairs = [{"prompt": prompt, "chosen": said[0], "rejected": said[1]} for prompt, said in rows]
        if "margin" not in roles:
            return pairs
        return [{**pair, "margin": margin} for pair, margin in zip(pairs, table[roles["margin"]], strict=True)]

    def _row(self, prompt: np.ndarray, said: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The longest completion is cut to half of the row at most, the prompt on its left to what is left."""
        if len(sizes) < 2:
            raise DataError(f"data.path={self.path}: a prompt with {len(sizes)} completions has nothing to compare")
        kept = min(sizes.max(), max(self.seq_len // 2, self.seq_len - len(prompt)))
        completions = [ids[:kept] for ids in np.split(said, sizes.cumsum()[:-1])]
        return prompt[max(len(prompt) + kept - self.seq_len, 0) :], completions

    def prompt(self) -> str:
        return self._text(self.tables()[1][0][self.columns["prompt"]])


def encode_compared(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt, of its completions end to end, and how many each of them has."""
    given = batch["completions"] if "completions" in batch else [*zip(batch["chosen"], batch["rejected"], strict=True)]
    rows = encode_answers(tokenizer, batch["prompt"], given, batch.get("tools"))
    return {
        "prompt": [prompt for prompt, _ in rows],
        "said": [np.concatenate([*answers, np.zeros(0, np.int32)]) for _, answers in rows],
        "sizes": [np.asarray([len(ids) for ids in answers], dtype=np.int32) for _, answers in rows],
    }


def encode_answered(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt and of its completion."""
    rows = encode_answers(tokenizer, batch["prompt"], [[answer] for answer in batch["completion"]], batch.get("tools"))
    return {"prompt": [prompt for prompt, _ in rows], "completion": [answer for _, (answer,) in rows]}


def encode_asked(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt."""
    return {"prompt": encode_prompts(tokenizer, batch["prompt"], batch.get("tools"))}


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


class UnpairedDataModule(TableDataModule):
    """Rows of token ids of a prompt and a completion, and whether that was liked; each is compared with another of its batch."""

    kind = "unpaired"
    least_rows = 2

    def __init__(self, *, prompt: str, completion: str, label: str, **rest: object) -> None:
        super().__init__(**rest)
        self.columns = {"prompt": prompt, "completion": completion, "label": label}

    def wanted(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def conversation_columns(self) -> list[str]:
        return list(self.columns.values())

    def plan(self) -> Plan:
        plan = super().plan()
        smallest = min(plan.batch_size, len(self.train_rows) - plan.batch_size * (plan.world_size - 1))
        if smallest < self.least_rows:
            raise ConfigError(
                f"data.batch_size={plan.batch_size} gives a process {max(smallest, 0)} of {len(self.train_rows)} rows: "
                "KTO compares a completion with another row's of the batch; it needs 2 rows or more"
            )
        return plan

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        return train_bpe((row[self.columns[role]] for row in train for role in ("prompt", "completion")), vocab_size)

    def rows(self, table: "Table") -> Dataset:
        roles = {role: self.columns[role] for role in ("prompt", "completion")}
        found = self.encoded(table, roles, encode_answered)
        columns = (lists(found, "prompt"), lists(found, "completion"), table[self.columns["label"]])
        return [self._row(*row) for row in zip(*columns, strict=True)]

    def _row(self, prompt: np.ndarray, completion: np.ndarray, label: object) -> dict[str, object]:
        """The completion is cut to half of the row at most, the prompt on its left to what is left."""
        completion = completion[: max(self.seq_len // 2, self.seq_len - len(prompt))]
        kept = prompt[max(len(prompt) + len(completion) - self.seq_len, 0) :]
        return {"prompt": kept, "completion": completion, "label": bool(label)}

    def prompt(self) -> str:
        return self._text(self.tables()[1][0][self.columns["prompt"]])


class PromptsDataModule(TableDataModule):
    """Rows of a tokenized prompt and, as they are, all columns: rewards may need them."""

    kind = "prompts"

    def __init__(self, *, prompt: str, max_prompt_len: int, **rest: object) -> None:
        super().__init__(**rest)
        self.column, self.max_prompt_len = prompt, max_prompt_len

    def wanted(self) -> dict[str, str]:
        return {"data.prompt": self.column}

    def conversation_columns(self) -> list[str]:
        return [self.column]

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        return train_bpe((row[self.column] for row in train), vocab_size)

    def rows(self, table: "Table") -> Dataset:
        prompts = lists(self.encoded(table, {"prompt": self.column}, encode_asked), "prompt")
        if not all(map(len, prompts)):
            raise DataError(f"data.path={self.path}: an empty prompt cannot be answered")
        room = min(self.max_prompt_len, self.collate.row_length(self.seq_len))
        n_cut = sum(len(ids) > room for ids in prompts)
        if n_cut:
            log.info(
                "data        %s of %s prompts are longer than %s tokens: their end is kept", n_cut, len(prompts), room
            )
        rows = zip(prompts, table, strict=True)
        return [{"prompt_ids": ids[-room:], "prompt": row[self.column], "columns": row} for ids, row in rows]

    def prompt(self) -> str:
        return self._text(self.tables()[1][0][self.column])
