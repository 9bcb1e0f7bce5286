"""Unpaired preference data: a prompt, a completion and whether it was liked (KTO).

The loss needs the completion of another row as a mismatched one, so every batch has at least two rows.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_label, refuse
from genai_pl.data.formats import TOOLS, parse_prompt
from genai_pl.data.loader import BatchPlan
from genai_pl.data.messages import extract_prompt, message_texts, parse_messages, text_or_messages
from genai_pl.data.messages_datamodule import MessagesDataModule, tools_argument
from genai_pl.data.prompt_tokens import encode_masked_answers
from genai_pl.data.records import Record
from genai_pl.data.table_datamodule import as_arrays
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


def tokenize_completions(batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt and of its completion, and which tokens of the completion count."""
    rows = encode_masked_answers(
        tokenizer, batch["prompt"], [[answer] for answer in batch["completion"]], **tools_argument(batch)
    )
    return {
        "prompt": [prompt for prompt, _ in rows],
        "completion": [answer.input_ids for _, (answer,) in rows],
        "counted": [answer.loss_mask.view(np.uint8) for _, (answer,) in rows],  # bytes: no array can map bits
    }


class UnpairedDataModule(MessagesDataModule):
    """Examples {"prompt": ids, "completion": ids, "label": bool}.

    prompt, completion, label: names of the columns. Other arguments: see `TableDataModule`.
    """

    kind = "unpaired"
    min_batch_rows = 2
    cell_kinds: ClassVar[dict[str, str]] = {**MessagesDataModule.cell_kinds, "label": "label"}

    def __init__(self, *, prompt: str, completion: str, label: str, **rest: object) -> None:
        super().__init__(**rest)
        self.columns = {"prompt": prompt, "completion": completion, "label": label}

    def roles(self, source: sources.Source, names: Sequence[str]) -> dict[str, str]:
        return self.recognized(source, names, self.columns)

    def batch_plan(self) -> BatchPlan:
        plan = super().batch_plan()
        smallest = min(plan.batch_size, len(self.train_rows) - plan.batch_size * (plan.world_size - 1))
        if smallest < self.min_batch_rows:
            raise ConfigError(
                f"data.batch_size={plan.batch_size} gives a process {max(smallest, 0)} of {len(self.train_rows)} rows: "
                "KTO compares a completion with another row's of the batch; it needs 2 rows or more"
            )
        return plan

    def table_roles(self, roles: Mapping[str, str]) -> list[str]:
        return ["prompt", "completion", "label", TOOLS]

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        if "messages" in roles:
            at = place.at(roles["messages"])
            *prompt, answer = parse_messages(record.get(roles["messages"]), at)
            if not prompt or answer["role"] != "assistant":
                refuse(at, "messages: the last is the assistant's answer that the label is of, after a prompt")
            label = parse_label(record.get(roles["label"]), place.at(roles["label"]))
            return {"prompt": prompt, "completion": [answer], "label": label}
        answer = text_or_messages(record.get(roles["completion"]), place.at(roles["completion"]))
        prompt, (completion,) = extract_prompt(parse_prompt(record, roles["prompt"], place), [answer], place)
        label = parse_label(record.get(roles["label"]), place.at(roles["label"]))
        return {"prompt": prompt, "completion": completion, "label": label}

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        values = (json.loads(row[role]) for row in train for role in ("prompt", "completion"))
        return (text for value in values for text in message_texts(value))

    def rows(self, table: "Table") -> Dataset:
        encoded = self.encode_table(table, self.encoded_roles(table, "prompt", "completion"), tokenize_completions)
        columns = (*(as_arrays(encoded, name) for name in ("prompt", "completion", "counted")), table["label"])
        return [self._row(*row) for row in zip(*columns, strict=True)]

    def _row(self, prompt: np.ndarray, completion: np.ndarray, counted: np.ndarray, label: bool) -> dict[str, object]:
        """The example in seq_len tokens: a long completion keeps half of them or what the prompt leaves, the prompt its end.

        `completion_mask` is there where some tokens do not count: those of tools' turns.
        """
        limit = max(self.seq_len // 2, self.seq_len - len(prompt))
        completion, mask = completion[:limit], counted[:limit].view(bool)
        prompt = prompt[max(len(prompt) + len(completion) - self.seq_len, 0) :]
        masks = {} if mask.all() else {"completion_mask": mask}
        return {"prompt": prompt, "completion": completion, "label": label, **masks}

    def prompt(self) -> str:
        return self.render(json.loads(self.tables()[1][0]["prompt"]))
