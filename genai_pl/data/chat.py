"""Examples to imitate, packed whole into rows: prompts and completions, or conversations."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, preview
from genai_pl.data.loader import Collate
from genai_pl.data.messages import Message, extract_prompt, message_texts, parse_messages, text_or_messages
from genai_pl.data.messages_datamodule import (
    CONTEXT,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    TOOLS,
    MessagesDataModule,
    parse_prompt,
    tools_argument,
)
from genai_pl.data.packing import PackedExamples
from genai_pl.data.prompt_tokens import (
    TokenizedExample,
    as_messages,
    encode_completions,
    encode_conversations,
    encode_messages,
    encode_prompt,
)
from genai_pl.data.table_datamodule import as_arrays
from genai_pl.data.tokenizer import train_bpe
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEFAULT = {"messages": "messages", "prompt": "prompt", "completion": "completion"}
ROLES = {"system", "user", "assistant", "tool", "developer", "function"}
CONVERSATIONS = "conversations"  # as ShareGPT has them


class ChatDataModule(MessagesDataModule):
    """Rows of whole examples, none of which sees another; only what the model is to say is a target."""

    kind = "chat"

    def __init__(self, *, messages: str, prompt: str, completion: str, packing: bool, **rest: object) -> None:
        super().__init__(**rest)
        self.packing = packing
        self.columns = {"messages": messages, "prompt": prompt, "completion": completion}

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        train, _ = self.tables()
        roles = [role for role in self.columns if role in train.column_names]
        return train_bpe(
            (text for row in train for role in roles for text in message_texts(json.loads(row[role]))), vocab_size
        )

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        self.room = collate.row_length(self.seq_len)
        super().prepare(tokenizer, collate)
        if self.has_conversations():
            self._warn_prompt_mismatch()

    def _warn_prompt_mismatch(self) -> None:
        """Log where the template asks for an answer with other words than stand before it in training."""
        row = self.tables()[0][0]
        messages, tools = (json.loads(row[name]) for name in ("messages" if "messages" in row else "prompt", TOOLS))
        if "messages" in row:
            last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=0)
            whole, messages = messages[: last + 1], messages[:last]
        else:
            whole = [*messages, *as_messages(json.loads(row["completion"]))]
        if not messages or whole[-1]["role"] != "assistant":
            return
        try:
            asked = encode_prompt(self.tokenizer, messages, tools)
        except DataError:  # a template that takes whole conversations only
            return
        learned = encode_messages(self.tokenizer, whole, tools).input_ids
        if not np.array_equal(learned[: len(asked)], asked):
            ends = (self.tokenizer.decode(ids[-12:]) for ids in (asked, learned[: len(asked)]))
            log.warning(
                "data        the chat template asks with %r, and this stands before an answer in training: %r", *ends
            )

    def roles(self, source: sources.Source, found: Sequence[str]) -> dict[str, str]:
        """The columns that are there, by role: messages, or prompt and completion, or what others call them."""
        if self.columns["messages"] in found:
            return {"messages": self.columns["messages"]}
        roles = {role: self.columns[role] for role in ("prompt", "completion")}
        if self.columns == DEFAULT and not set(roles.values()) <= set(found):
            if CONVERSATIONS in found:
                log.info("data        column %s of %s is read as messages", CONVERSATIONS, source.name)
                return {"messages": CONVERSATIONS}
            if {INSTRUCTION, OUTPUT} <= set(found):
                roles = {"prompt": INSTRUCTION, "completion": OUTPUT}
        sources.check_columns(source, found, {f"data.{role}": column for role, column in roles.items()})
        if roles["prompt"] == INSTRUCTION:
            beside = next((column for column in (INPUT, CONTEXT) if column in found), None)
            more = f", then {beside} after a blank line" if beside else ""
            names = source.name, INSTRUCTION, more, roles["completion"]
            log.info("data        prompts of %s are column %s%s; completions %s", *names)
        return roles

    def example(self, row: Mapping[str, object], roles: Mapping[str, str], place: Place) -> dict[str, object]:
        if "messages" in roles:
            column = roles["messages"]
            return {"messages": parse_messages(row.get(column), place._replace(column=column))}
        said = text_or_messages(row.get(roles["completion"]), place._replace(column=roles["completion"]))
        prompt, (completion,) = extract_prompt(parse_prompt(row, roles["prompt"], place), [said], place)
        return {"prompt": prompt, "completion": completion}

    def rows(self, table: "Table") -> Dataset:
        part = "training" if table is self.tables()[0] else "validation"
        roles = [role for role in self.columns if role in table.column_names]
        examples = []
        cut = silent = 0
        option = "data.path" if self.source_of(table) is self.source else "data.val_path"
        spoken = self._unknown_roles(table)
        found = self.encode_table(table, self.encoded_roles(table, *roles), tokenize_examples)
        for example in map(TokenizedExample, as_arrays(found, "input_ids"), as_arrays(found, "loss_mask")):
            cut += len(example.input_ids) > self.room
            example = TokenizedExample(example.input_ids[: self.room], example.loss_mask[: self.room].view(bool))
            if example.loss_mask[1:].any():  # the first token of a row is predicted by nothing
                examples.append(example)
            else:
                silent += 1
        if not examples:
            raise DataError(
                f"{option}={self.source_of(table).name}: no {part} example has anything to learn in its first "
                f"{self.room} tokens{spoken}"
            )
        for n, what in (
            (cut, f"are longer than {self.room} tokens and were cut"),
            (silent, f"have nothing to learn{spoken}: left out"),
        ):
            if n:
                log.info("data        %s of %s %s examples %s", f"{n:,}", f"{len(table):,}", part, what)
        return PackedExamples(examples, self.room if self.packing else 0)

    def _unknown_roles(self, table: "Table") -> str:
        """Says who speaks besides the roles that chat templates know, since nothing of that is learned."""
        role = "messages" if "messages" in table.column_names else "completion"
        given = (json.loads(cell) for cell in table[role])
        roles = {message["role"] for messages in given if not isinstance(messages, str) for message in messages}
        if roles <= ROLES:
            return ""
        return f" (roles: {', '.join(map(preview, sorted(roles)))}; only what 'assistant' says is learned)"

    def summary(self) -> str:
        train, val = self.tables()
        rows = f"{len(self.train_rows):,} rows of at most {self.room - 1} tokens"
        return f"{self.path}, {len(train):,} examples for training in {rows}, {len(val):,} held"

    def prompt(self) -> str:
        first = self.tables()[1][0]
        return self.render(
            json.loads(first["prompt"]) if "prompt" in first else _opening(json.loads(first["messages"]))
        )


def tokenize_examples(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each example, and 1 where they are to be learned."""
    if "messages" in batch:
        given = [0] * len(batch["messages"])
        examples = encode_conversations(tokenizer, batch["messages"], given, **tools_argument(batch))
    else:
        examples = encode_completions(tokenizer, batch["prompt"], batch["completion"], **tools_argument(batch))
    return {
        "input_ids": [example.input_ids for example in examples],
        # as bytes: arrow packs bits, and no array could lie there
        "loss_mask": [example.loss_mask.view(np.uint8) for example in examples],
    }


def _opening(messages: list[Message]) -> list[Message]:
    """What stands before the first answer."""
    return messages[: next((n for n, message in enumerate(messages) if message["role"] == "assistant"), len(messages))]
