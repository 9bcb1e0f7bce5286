"""Prompts with two completions, of which people preferred one; and prompts alone, to be answered in training."""

from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.chat import encode_completion, encode_prompt
from genai_pl.data.loader import Collate
from genai_pl.data.table import TableDataModule
from genai_pl.data.tokenizer import train_bpe
from genai_pl.errors import ConfigError, DataError

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
        return [self._encode({role: row[column] for role, column in roles.items()}) for row in table]

    def _encode(self, row: dict[str, object]) -> dict[str, object]:
        """The longest completion is cut to half of the row at most, the prompt on its left to what is left."""
        prompt = encode_prompt(self.tokenizer, row["prompt"])
        ranked = "completions" in row
        given = row["completions"] if ranked else [row["chosen"], row["rejected"]]
        if len(given) < 2:
            raise DataError(f"data.path={self.path}: a prompt with {len(given)} completions has nothing to compare")
        examples = [encode_completion(self.tokenizer, row["prompt"], said) for said in given]
        said = [example.input_ids[example.loss_mask] for example in examples]
        longest = max(map(len, said))
        kept = min(longest, max(self.seq_len // 2, self.seq_len - len(prompt)))
        said = [ids[:kept] for ids in said]
        found = {"completions": said} if ranked else dict(zip(("chosen", "rejected"), said, strict=True))
        extra = {"margin": row["margin"]} if "margin" in row else {}
        return {"prompt": prompt[max(len(prompt) + kept - self.seq_len, 0) :], **found, **extra}

    def prompt(self) -> str:
        return self._text(self.tables()[1][0][self.columns["prompt"]])


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


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
