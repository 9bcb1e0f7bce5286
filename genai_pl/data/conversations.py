"""Examples to imitate, packed whole into rows: prompts and completions, or conversations."""

import logging
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.chat import Example, encode_completions, encode_conversations, prompt_text
from genai_pl.data.loader import Collate
from genai_pl.data.packing import Row
from genai_pl.data.table import TableDataModule, lists
from genai_pl.data.tokenizer import train_bpe
from genai_pl.errors import DataError
from genai_pl.objectives.sft import pack

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class ChatDataModule(TableDataModule):
    """Rows of whole examples, none of which sees another; only what the model is to say is a target."""

    kind = "chat"

    def __init__(self, *, messages: str, prompt: str, completion: str, packing: bool, **rest: object) -> None:
        super().__init__(**rest)
        self.packing = packing
        self.columns = {"messages": messages, "prompt": prompt, "completion": completion}

    def wanted(self) -> dict[str, str]:
        return {}  # which ones, depends on what is there

    def conversation_columns(self) -> list[str]:
        return list(self.columns.values())

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        return train_bpe((text for row in train for text in _texts(row, self._roles(train))), vocab_size)

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        self.room = collate.row_length(self.seq_len)
        super().prepare(tokenizer, collate)

    def _roles(self, table: "Table") -> dict[str, str]:
        """The columns that are there, by role: messages, or prompt and completion."""
        found = table.column_names
        if self.columns["messages"] in found:
            return {"messages": self.columns["messages"]}
        roles = {role: self.columns[role] for role in ("prompt", "completion")}
        sources.check_columns(self.source, table, {f"data.{role}": column for role, column in roles.items()})
        return roles

    def rows(self, table: "Table") -> Dataset:
        part = "training" if table is self.tables()[0] else "validation"
        roles = self._roles(table)
        examples = []
        cut = silent = 0
        found = self.encoded(table, roles, encode_examples)
        for example in map(Example, lists(found, "input_ids"), lists(found, "loss_mask")):
            cut += len(example.input_ids) > self.room
            example = Example(example.input_ids[: self.room], example.loss_mask[: self.room].view(bool))
            if example.loss_mask[1:].any():  # the first token of a row is predicted by nothing
                examples.append(example)
            else:
                silent += 1
        if not examples:
            raise DataError(
                f"data.path={self.path}: no {part} example has anything to learn in its first {self.room} tokens"
            )
        for n, what in (
            (cut, f"are longer than {self.room} tokens and were cut"),
            (silent, "have nothing to learn: left out"),
        ):
            if n:
                log.info("data        %s of %s %s examples %s", f"{n:,}", f"{len(table):,}", part, what)
        return PackedExamples(examples, self.room if self.packing else 0)

    def summary(self) -> str:
        train, val = self.tables()
        rows = f"{len(self.train_rows):,} rows of at most {self.room - 1} tokens"
        return f"{self.path}, {len(train):,} examples for training in {rows}, {len(val):,} held"

    def prompt(self) -> str:
        _, val = self.tables()
        return _opening(val[0], self._roles(val), self.tokenizer)


class PackedExamples(Dataset):
    """Rows of examples that fit into `room` tokens together; one example a row where it is 0."""

    def __init__(self, examples: list[Example], room: int) -> None:
        self.examples = examples
        lengths = [len(example.input_ids) for example in examples]
        self.bins = pack(lengths, room) if room else [[n] for n in range(len(examples))]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Row:
        chosen = [self.examples[n] for n in self.bins[index]]
        lengths = [len(example.input_ids) for example in chosen]
        return {
            "input_ids": np.concatenate([example.input_ids for example in chosen]),
            "segment_ids": np.repeat(np.arange(len(chosen)) + 1, lengths),
            "loss_mask": np.concatenate([example.loss_mask for example in chosen]),
        }


def encode_examples(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each example, and 1 where they are to be learned."""
    if "messages" in batch:
        examples = encode_conversations(tokenizer, batch["messages"], [0] * len(batch["messages"]), batch.get("tools"))
    else:
        examples = encode_completions(tokenizer, batch["prompt"], batch["completion"], batch.get("tools"))
    return {
        "input_ids": [example.input_ids for example in examples],
        # as bytes: arrow packs bits, and no array could lie there
        "loss_mask": [example.loss_mask.view(np.uint8) for example in examples],
    }


def _texts(row: dict, roles: dict[str, str]) -> list[str]:
    values = [row[column] for column in roles.values()]
    return [text for value in values for text in ([value] if isinstance(value, str) else [m["content"] for m in value])]


def _opening(row: dict, roles: dict[str, str], tokenizer: "PreTrainedTokenizerBase") -> str:
    """What stands before the first answer, as text."""
    given = row[roles["messages"]] if "messages" in roles else row[roles["prompt"]]
    if isinstance(given, str):
        return given
    before = given[: next((n for n, m in enumerate(given) if m["role"] == "assistant"), len(given))]
    return prompt_text(tokenizer, before) if before else ""
