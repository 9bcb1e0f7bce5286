"""Stepwise data: prompts with the steps of an answer and a label for each, for process reward models.

A row is the prompt and its steps as `steps` encodes them; the label of a step stands at its separator's last token, as
TRL's PRMTrainer had it.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch.utils.data import Dataset

from genai_pl.config.labels import STEP_LABELS, Labels
from genai_pl.data import sources
from genai_pl.data.columns import Place, parse_degree, parse_list, parse_text, refuse
from genai_pl.data.formats import TOOLS, parse_prompt
from genai_pl.data.messages import message_texts
from genai_pl.data.messages_datamodule import MessagesDataModule, tools_argument
from genai_pl.data.records import Record
from genai_pl.data.steps import encode_steps
from genai_pl.data.table_datamodule import TableDataModule, as_arrays
from genai_pl.errors import ConfigError, DataError
from genai_pl.objectives.token_loss import IGNORED

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from transformers import PreTrainedTokenizerBase


class StepwiseDataModule(MessagesDataModule):
    """Examples {"input_ids": ids, "labels": numbers}, -100 where no step ends.

    prompt, completions, labels: names of the columns; a prompt is text or messages, completions a list of steps, labels one
    number from 0 to 1, or true or false, for each. Blank steps are left out with their labels, as of completions that a reward
    divides. step_separator: text after each step. train_on_last_step_only: the other
    labels are not learned. Other arguments: see `TableDataModule`.
    """

    kind = "stepwise"
    cell_kinds: ClassVar[dict[str, str]] = dict.fromkeys(("prompt", "completions", "labels", TOOLS), "json")

    def __init__(
        self,
        *,
        prompt: str,
        completions: str,
        labels: str,
        step_separator: str,
        train_on_last_step_only: bool,
        **rest: object,
    ) -> None:
        super().__init__(**rest)
        if not step_separator:
            raise ConfigError("data.step_separator is empty: give the text that ends a step, such as a line break")
        self.columns = {"prompt": prompt, "completions": completions, "labels": labels}
        self.step_separator, self.train_on_last_step_only = step_separator, train_on_last_step_only
        self.n_blank = 0  # steps that were left out of the file that is read

    def required_columns(self) -> dict[str, str]:
        return {f"data.{role}": column for role, column in self.columns.items()}

    def roles(self, source: sources.Source, names: Sequence[str]) -> dict[str, str]:
        return TableDataModule.roles(self, source, names)

    def read_table(self, source: sources.Source) -> "Table":
        self.n_blank = 0
        table = super().read_table(source)
        if self.n_blank:
            log.info("data        %s: %d blank steps are left out, with their labels", source.name, self.n_blank)
        return table

    def example(self, record: Record, roles: Mapping[str, str], place: Place) -> dict[str, object]:
        at = {role: place.at(column) for role, column in roles.items()}
        steps = parse_list(record.get(roles["completions"]), at["completions"], parse_text)
        labels = parse_list(record.get(roles["labels"]), at["labels"], parse_degree)
        if not steps or len(steps) != len(labels):
            refuse(
                at["labels"], f"{len(labels)} labels for {len(steps)} steps: give each step one, and at least one step"
            )
        written = [n for n, step in enumerate(steps) if step.strip()]
        if not written:
            refuse(at["completions"], "all steps are blank: leave the row out")
        self.n_blank += len(steps) - len(written)
        steps, labels = ([column[n] for n in written] for column in (steps, labels))
        return {"prompt": parse_prompt(record, roles["prompt"], place), "completions": steps, "labels": labels}

    def find_labels(self, known: Labels | None) -> Labels:
        """Incorrect and correct, or the names of the model's two outputs; the separator is kept with the model."""
        names = known.names if known is not None and len(known.names) == len(STEP_LABELS) else STEP_LABELS
        self.fixed_labels = Labels(names, step_separator=self.step_separator)
        return self.fixed_labels

    def prepare_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Nothing: rows need no token of their own."""

    def training_texts(self) -> Iterable[str]:
        train, _ = self.tables()
        for row in train:
            yield from message_texts(json.loads(row["prompt"]))
            yield from (step + self.step_separator for step in json.loads(row["completions"]))

    def encoded_steps(self, table: "Table") -> "Table":
        """Tokens of each `prompt`, of its `steps` end to end, and the `ends` of these, counted from the first one's start."""
        roles = self.encoded_roles(table, "prompt", "completions")
        return self.encode_table(table, roles, tokenize_steps, separator=self.step_separator)

    def rows(self, table: "Table") -> Dataset:
        encoded = self.encoded_steps(table)
        columns = (as_arrays(encoded, name) for name in ("prompt", "steps", "ends"))
        rows, n_cut, n_lost = [], 0, 0
        for prompt, steps, ends, cell in zip(*columns, table["labels"], strict=True):
            labels = np.full(len(prompt) + len(steps), float(IGNORED), dtype=np.float32)
            learned = slice(-1, None) if self.train_on_last_step_only else slice(None)
            labels[len(prompt) + ends[learned] - 1] = np.asarray(json.loads(cell), dtype=np.float32)[learned]
            row = {"input_ids": np.concatenate([prompt, steps])[: self.seq_len], "labels": labels[: self.seq_len]}
            n_cut += len(labels) > self.seq_len
            n_lost += bool((row["labels"] == IGNORED).all())
            rows.append(row)
        self._report(table, n_cut, n_lost)
        return rows

    def _report(self, table: "Table", n_cut: int, n_lost: int) -> None:
        """Log rows that are cut, and steps that a reward would divide; DataError where no row keeps a label."""
        if n_lost == len(table):
            raise DataError(
                f"data.path={self.path}: no row keeps a label within data.seq_len={self.seq_len} tokens; raise it"
            )
        if n_cut:
            log.info(
                "data        %d of %d rows lose steps behind %d tokens (data.seq_len), %d of them all their labels",
                *(n_cut, len(table), self.seq_len, n_lost),
            )
        n = sum(self.step_separator in step for cell in table["completions"] for step in json.loads(cell))
        if n:
            log.warning("data        %d steps have data.step_separator inside: as a reward they are read as several", n)

    def prompt(self) -> str:
        """A prompt with its steps, as they are read."""
        row = self.tables()[1][0]
        steps = (step + self.step_separator for step in json.loads(row["completions"]))
        return self.render(json.loads(row["prompt"])) + "".join(steps)


def tokenize_steps(
    batch: dict[str, list], tokenizer: "PreTrainedTokenizerBase", separator: str
) -> dict[str, list[np.ndarray]]:
    """Token ids of each prompt, of its steps end to end with a separator after each, and where these end."""
    tools = tools_argument(batch).get(TOOLS)
    rows = encode_steps(tokenizer, batch["prompt"], batch["completions"], separator, tools)
    return dict(zip(("prompt", "steps", "ends"), map(list, zip(*rows, strict=True)), strict=True))
