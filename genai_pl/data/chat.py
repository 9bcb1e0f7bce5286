"""Chat data: prompts with completions, or conversations, tokenized with a loss mask and packed whole into rows.

One option file, several spellings of a data set (`formats.FORMATS`): a column of messages, prompt and completion,
ShareGPT's conversations, or Alpaca's instruction, input and output. All become `TokenizedExample`s: token ids, and a
mask that is True where the model is to produce the token. Which tokens those are is decided in `prompt_tokens` alone,
the same code that generation and serving prompt with.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_text, preview
from genai_pl.data.formats import TOOLS, instruction_messages, parse_prompt
from genai_pl.data.loader import Collate
from genai_pl.data.messages import Message, extract_prompt, message_texts, parse_messages, text_or_messages
from genai_pl.data.messages_datamodule import MessagesDataModule, tools_argument
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
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEFAULT = {"messages": "messages", "prompt": "prompt", "completion": "completion"}
ROLES = {"system", "user", "assistant", "tool", "developer", "function"}


class ChatDataModule(MessagesDataModule):
    """Packed rows of whole examples for supervised fine-tuning; only tokens that the model is to produce are targets.

    messages, prompt, completion: names of the columns. A source with a column of messages is read as conversations,
        else by prompt and completion; with the default names, the formats of other projects are recognized too.
    packing: put several examples into a row (`PackedExamples`); False gives each example a row of its own.
    Other arguments: see `TableDataModule`.

    An example longer than a row is truncated on the right. One without any target left is dropped and counted in the log.
    """

    kind = "chat"

    def __init__(self, *, messages: str, prompt: str, completion: str, packing: bool, **rest: object) -> None:
        super().__init__(**rest)
        self.packing = packing
        self.columns = {"messages": messages, "prompt": prompt, "completion": completion}

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        roles = [role for role in self.columns if role in train.column_names]
        return (text for row in train for role in roles for text in message_texts(json.loads(row[role])))

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        self.capacity = collate.row_length(self.seq_len)
        super().prepare(tokenizer, collate)
        if self.has_conversations():
            self._warn_prompt_mismatch()

    def _warn_prompt_mismatch(self) -> None:
        """Log a warning where the generation prompt differs from the tokens before an answer in training.

        The model would then be prompted with something that it never saw: some templates add an empty thought or a system
        message in one of the two cases only. The first training example is compared.
        """
        # split the first training example before its last answer
        row = self.tables()[0][0]
        messages, tools = (json.loads(row[name]) for name in ("messages" if "messages" in row else "prompt", TOOLS))
        if "messages" in row:
            last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=0)
            conversation, messages = messages[: last + 1], messages[:last]
        else:
            conversation = [*messages, *as_messages(json.loads(row["completion"]))]
        if not messages or conversation[-1]["role"] != "assistant":
            return
        # the tokens that the model will be prompted with
        try:
            prompt_ids = encode_prompt(self.tokenizer, messages, tools)
        except DataError:  # a template that takes conversation conversations only
            return
        # compare the prompt with the tokens that precede the answer in training
        trained_ids = encode_messages(self.tokenizer, conversation, tools).input_ids
        if not np.array_equal(trained_ids[: len(prompt_ids)], prompt_ids):
            ends = (self.tokenizer.decode(ids[-12:]) for ids in (prompt_ids, trained_ids[: len(prompt_ids)]))
            log.warning(
                "data        the chat template asks with %r, and this stands before an answer in training: %r", *ends
            )

    def roles(self, source: sources.Source, names: Sequence[str]) -> dict[str, str]:
        """The columns to read, by role: messages, or prompt and completion, under their own or under well-known names."""
        return self.recognized(source, names, None if self.columns == DEFAULT else self.columns)

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
        return ["prompt", "completion", TOOLS] if "prompt" in roles else ["messages", TOOLS]

    def example(self, record: Mapping[str, object], roles: Mapping[str, str], place: Place) -> dict[str, object]:
        if "instruction" in roles:  # Alpaca and Dolly
            column = roles["output"] if "output" in roles else roles["response"]
            answer = {"role": "assistant", "content": parse_text(record.get(column), place.at(column))}
            return {"messages": [*instruction_messages(record, roles, place), answer]}
        if "prompt" not in roles:
            column = roles["messages"] if "messages" in roles else roles["conversations"]
            if "conversations" in roles and record.get(column) == []:
                return {"messages": []}  # ShareGPT has them: left out with the others that have nothing to learn
            return {"messages": parse_messages(record.get(column), place.at(column))}
        answer = text_or_messages(record.get(roles["completion"]), place.at(roles["completion"]))
        prompt, (completion,) = extract_prompt(parse_prompt(record, roles["prompt"], place), [answer], place)
        return {"prompt": prompt, "completion": completion}

    def rows(self, table: "Table") -> Dataset:
        part = "training" if table is self.tables()[0] else "validation"
        roles = [role for role in self.columns if role in table.column_names]
        examples = []
        n_truncated = n_dropped = 0
        option = "data.path" if self.source_of(table) is self.source else "data.val_path"
        role_note = self._unknown_roles(table)
        encoded = self.encode_table(table, self.encoded_roles(table, *roles), tokenize_examples)
        # truncate to a row; without a target in it an example teaches nothing
        for example in map(TokenizedExample, as_arrays(encoded, "input_ids"), as_arrays(encoded, "loss_mask")):
            n_truncated += len(example.input_ids) > self.capacity
            example = TokenizedExample(
                example.input_ids[: self.capacity], example.loss_mask[: self.capacity].view(bool)
            )
            if example.loss_mask[1:].any():  # nothing predicts the first token of a row
                examples.append(example)
            else:
                n_dropped += 1
        # report what was lost
        if not examples:
            raise DataError(
                f"{option}={self.source_of(table).name}: no {part} example has anything to learn in its first "
                f"{self.capacity} tokens{role_note}"
            )
        for n, text in (
            (n_truncated, f"are longer than {self.capacity} tokens and were cut"),
            (n_dropped, f"have nothing to learn{role_note}: left out"),
        ):
            if n:
                log.info("data        %s of %s %s examples %s", f"{n:,}", f"{len(table):,}", part, text)
        return PackedExamples(examples, self.capacity if self.packing else 0)

    def _unknown_roles(self, table: "Table") -> str:
        """A note for error and log that names roles other than those of chat templates: only an assistant's turns are learned."""
        role = "messages" if "messages" in table.column_names else "completion"
        cells = (json.loads(cell) for cell in table[role])
        roles = {message["role"] for messages in cells if not isinstance(messages, str) for message in messages}
        if roles <= ROLES:
            return ""
        return f" (roles: {', '.join(map(preview, sorted(roles)))}; only what 'assistant' says is learned)"

    def summary(self) -> str:
        train, val = self.tables()
        rows = f"{len(self.train_rows):,} rows of at most {self.capacity - 1} tokens"
        return f"{self.path}, {len(train):,} examples for training in {rows}, {len(val):,} held"

    def prompt(self) -> str:
        first = self.tables()[1][0]
        return self.render(
            json.loads(first["prompt"]) if "prompt" in first else _opening(json.loads(first["messages"]))
        )


def tokenize_examples(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids and loss mask of each example of a batch of columns, as encoded tables hold them."""
    if "messages" in batch:
        examples = _encode_messages(batch, tokenizer)
    else:
        examples = encode_completions(tokenizer, batch["prompt"], batch["completion"], **tools_argument(batch))
    return {
        "input_ids": [example.input_ids for example in examples],
        # as bytes: arrow packs booleans into bits, which no array can map
        "loss_mask": [example.loss_mask.view(np.uint8) for example in examples],
    }


def _encode_messages(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> list[TokenizedExample]:
    """The example of each conversation of a batch, without tokens where the conversation has no messages."""
    filled = [n for n, messages in enumerate(batch["messages"]) if messages]
    given = {name: [values[n] for n in filled] for name, values in batch.items()}
    encoded = encode_conversations(tokenizer, given["messages"], [0] * len(filled), **tools_argument(given))
    examples = [TokenizedExample(np.zeros(0, np.int32), np.zeros(0, bool))] * len(batch["messages"])
    for n, example in zip(filled, encoded, strict=True):
        examples[n] = example
    return examples


def _opening(messages: list[Message]) -> list[Message]:
    """The messages before the first answer."""
    return messages[: next((n for n, message in enumerate(messages) if message["role"] == "assistant"), len(messages))]
