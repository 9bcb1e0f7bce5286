"""Prompt data: prompts that the policy answers while it trains (PPO, GRPO, RLOO), with all columns of their rows.

A reward function receives the columns by name, so a data set of sums can carry its solutions. Prompts are truncated on
the left: their end is what is answered.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place
from genai_pl.data.formats import TOOLS, instruction_messages, parse_prompt
from genai_pl.data.messages import message_texts
from genai_pl.data.messages_datamodule import MessagesDataModule, tools_argument
from genai_pl.data.prompt_tokens import encode_prompts
from genai_pl.data.records import Record
from genai_pl.data.table_datamodule import as_arrays
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def tokenize_prompts(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt."""
    return {"prompt": encode_prompts(tokenizer, batch["prompt"], **tools_argument(batch))}


class PromptsDataModule(MessagesDataModule):
    """Examples {"prompt_ids": (n,), "prompt": text or messages, "columns": all columns of the row}.

    prompt: name of the column. max_prompt_len: tokens of a prompt at most. Other arguments: see `TableDataModule`.
    """

    kind = "prompts"
    keeps_all_columns = True

    def __init__(self, *, prompt: str, max_prompt_len: int, **rest: object) -> None:
        super().__init__(**rest)
        self.column, self.max_prompt_len = prompt, max_prompt_len

    def roles(self, source: sources.Source, names: Sequence[str]) -> dict[str, str]:
        return self.recognized(source, names, None if self.column == "prompt" else {"prompt": self.column})

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
        return ["prompt", TOOLS]

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        if "instruction" in roles:
            return {"prompt": instruction_messages(record, roles, place)}
        return {"prompt": parse_prompt(record, roles["prompt"], place)}

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        return (text for row in train for text in message_texts(json.loads(row["prompt"])))

    def rows(self, table: "Table") -> Dataset:
        prompts = as_arrays(self.encode_table(table, self.encoded_roles(table, "prompt"), tokenize_prompts), "prompt")
        # the columns as they are written in the source, not as parsed
        source = self.source_of(table)
        records = [record for _, record in sources.read_records(source)]
        names = dict.fromkeys(name for record in records for name in record)
        # a prompt and its completion share the context
        max_len = min(self.max_prompt_len, self.collate.row_length(self.seq_len))
        n_truncated, rows = sum(len(ids) > max_len for ids in prompts), []
        if n_truncated:
            log.info(
                "data        %d of %d prompts are longer than %d tokens: their end is kept",
                n_truncated,
                len(prompts),
                max_len,
            )
        for ids, prompt, number in zip(prompts, table["prompt"], table["row"], strict=True):
            if not len(ids):
                raise DataError(f"{sources.locate_row(source, number)}: an empty prompt cannot be answered")
            columns = {name: records[number - 1].get(name) for name in names}
            rows.append({"prompt_ids": ids[-max_len:], "prompt": json.loads(prompt), "columns": columns})
        return rows

    def prompt(self) -> str:
        return self.render(json.loads(self.tables()[1][0]["prompt"]))
