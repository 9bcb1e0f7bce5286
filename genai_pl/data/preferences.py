"""Prompts with two completions, of which people preferred one; and prompts alone, to be answered in training."""

from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data.chat import encode_completion, encode_prompt
from genai_pl.data.table import TableDataModule
from genai_pl.data.tokenizer import train_bpe
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(TableDataModule):
    """Rows of token ids: prompt, chosen, rejected, and a margin where there is one."""

    kind = "preference"

    def __init__(self, *, prompt: str, chosen: str, rejected: str, margin: str | None, **rest: object) -> None:
        super().__init__(**rest)
        self.columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        self.columns |= {"margin": margin} if margin else {}

    def wanted(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        names = [self.columns[role] for role in ("prompt", "chosen")]
        return train_bpe((text for row in train for name in names if isinstance(text := row[name], str)), vocab_size)

    def rows(self, table: "Table") -> Dataset:
        return [self._encode({role: row[column] for role, column in self.columns.items()}) for row in table]

    def _encode(self, row: dict[str, object]) -> dict[str, object]:
        """The longer completion is cut to half of the row at most, the prompt on its left to what is left."""
        prompt = encode_prompt(self.tokenizer, row["prompt"])
        completions = {}
        for role in ("chosen", "rejected"):
            example = encode_completion(self.tokenizer, row["prompt"], row[role])
            completions[role] = example.input_ids[example.loss_mask]
        longest = max(len(ids) for ids in completions.values())
        kept = min(longest, max(self.seq_len // 2, self.seq_len - len(prompt)))
        completions = {role: ids[:kept] for role, ids in completions.items()}
        extra = {"margin": row["margin"]} if "margin" in row else {}
        return {"prompt": prompt[max(len(prompt) + kept - self.seq_len, 0) :], **completions, **extra}

    def prompt(self) -> str:
        return self._text(self.tables()[1][0][self.columns["prompt"]])


class UnpairedDataModule(TableDataModule):
    """Rows of token ids of a prompt and a completion, and whether that was liked."""

    kind = "unpaired"

    def __init__(self, *, prompt: str, completion: str, label: str, **rest: object) -> None:
        super().__init__(**rest)
        self.columns = {"prompt": prompt, "completion": completion, "label": label}

    def wanted(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        return train_bpe((row[self.columns[role]] for row in train for role in ("prompt", "completion")), vocab_size)

    def rows(self, table: "Table") -> Dataset:
        return [self._encode({role: row[column] for role, column in self.columns.items()}) for row in table]

    def _encode(self, row: dict[str, object]) -> dict[str, object]:
        """The completion is cut to half of the row at most, the prompt on its left to what is left."""
        prompt = encode_prompt(self.tokenizer, row["prompt"])
        example = encode_completion(self.tokenizer, row["prompt"], row["completion"])
        completion = example.input_ids[example.loss_mask]
        completion = completion[: max(self.seq_len // 2, self.seq_len - len(prompt))]
        kept = prompt[max(len(prompt) + len(completion) - self.seq_len, 0) :]
        return {"prompt": kept, "completion": completion, "label": bool(row["label"])}

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

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        return train_bpe((row[self.column] for row in train), vocab_size)

    def rows(self, table: "Table") -> Dataset:
        rows = []
        for row in table:
            ids = encode_prompt(self.tokenizer, row[self.column])
            if len(ids) == 0:
                raise DataError(f"data.path={self.path}: an empty prompt cannot be answered")
            rows.append({"prompt_ids": np.asarray(ids[-self.max_prompt_len :]), "columns": row})
        return rows

    def prompt(self) -> str:
        return self._text(self.tables()[1][0][self.column])
