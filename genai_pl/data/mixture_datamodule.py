"""Mixtures: several sources, each read by the data module of its kind, in one order of rows with exact shares.

A source keeps its own columns, validation data and form (files or a stream). Rows of all of them meet in a batch; each
carries the number of its source, so that losses are also known by source.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader

from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.loader import Collate, validation_batches
from genai_pl.data.mixed_stream import NUMBER, MixedStream, with_sources
from genai_pl.data.mixture import Mixture, Points, SourcePlan
from genai_pl.data.packing import KeyedExamples
from genai_pl.data.row_sizes import row_examples, row_tokens
from genai_pl.data.streaming import StreamLoader
from genai_pl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROW_KINDS = ("text", "chat")  # kinds whose rows are tokens with segments: they may meet in one batch
OPTION = re.compile(
    r"(?<![\w./])data\.(?=(path|val_\w+|columns?|format|deduplicate|streaming|messages|prompt|completion|chosen|rejected"
    r"|margin)\b)"
)


class MixedSource(NamedTuple):
    """One source of a mixture.

    data: reads it. weight: points of its weight over the run, or None for its size. epochs, cap: passes, or tokens (or
    examples, as the mixture is weighed), after which it ends; None for never.
    """

    name: str
    data: RowsDataModule
    weight: Points | None = None
    epochs: int | None = None
    cap: int | None = None


class MixtureDataModule(RowsDataModule):
    """Training batches of a mixture, and validation batches of one source each.

    sources: what is mixed. kind: the kind of data that the objective is given. by_tokens: weights are shares of tokens;
    False: of examples. temperature: weights are raised to 1 / temperature. Other arguments: see `RowsDataModule`.
    """

    def __init__(
        self, sources: Sequence[MixedSource], *, kind: str, by_tokens: bool, temperature: float, **loading: object
    ) -> None:
        super().__init__(**loading)
        self.sources, self.kind, self.by_tokens, self.temperature = list(sources), kind, by_tokens, temperature
        self.source_names = tuple(source.name for source in self.sources)
        self.streaming = any(source.data.streaming for source in self.sources)
        self.min_batch_rows = max(source.data.min_batch_rows for source in self.sources)
        self.path = ", ".join(f"{source.name}: {source.data.path}" for source in self.sources)
        self._stream: MixedStream | None = None

    def fit_to_model(self, **sizes: int) -> None:
        super().fit_to_model(**sizes)
        for source in self.sources:
            source.data.fit_to_model(**sizes)

    def training_texts(self) -> Iterable[str]:
        return chain.from_iterable(source.data.training_texts() for source in self.sources)

    def has_conversations(self) -> bool:
        found = False
        for source in self.sources:
            with naming(source.name):
                found = source.data.has_conversations() or found
        return found

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        """Let every source tokenize, and set the plan of the mixture; ConfigError for what cannot be mixed."""
        self.collate = collate
        for source in self.sources:
            with naming(source.name):
                source.data.prepare(tokenizer, collate)
        self._check_columns()
        self._share_columns()
        self.train_rows = ConcatDataset([s.data.train_rows for s in self.sources if not s.data.streaming] or [[]])
        self.val_rows = ConcatDataset([source.data.val_rows for source in self.sources])
        self.plans = [self._plan(source) for source in self.sources]

    def _check_columns(self) -> None:
        """ConfigError where rows of two sources cannot be in one batch, as one has a field that the other lacks."""
        first, *others = [s for s in self.sources if s.data.kind not in ROW_KINDS] or [None]
        for other in others:
            ours, theirs = (set(source.data.val_rows[0]) for source in (first, other))
            if lacking := sorted(ours ^ theirs):
                which = (first, other) if lacking[0] in ours else (other, first)
                raise ConfigError(
                    f"data.sources: {which[0].name} has {lacking[0]} and {which[1].name} has not; give it to all sources "
                    "or to none"
                )

    def _share_columns(self) -> None:
        """Give all prompts the columns of all sources, None where a source has none: a reward receives them by name."""
        prompts = [source.data for source in self.sources if source.data.kind == "prompts"]
        names = dict.fromkeys(name for data in prompts for name in data.val_rows[0]["columns"])
        for data in prompts:
            for row in (*data.train_rows, *data.val_rows):
                row["columns"] = {**dict.fromkeys(names), **row["columns"]}

    def _plan(self, source: MixedSource) -> SourcePlan:
        """The part of a source in the schedule, by what its rows hold."""
        data, name = source.data, f"data.sources.{source.name}"
        if data.streaming:
            for option in ("weight", "epochs"):
                if (getattr(source, option) is None) == (option == "weight"):
                    fix = "give it a number" if option == "weight" else "set cap, in tokens"
                    raise ConfigError(f"{name}.{option}: the length of a stream is unknown; {fix}")
            tokens = data.row_length - data.packing["overlap"]
            costs, n_rows, size = tokens if self.by_tokens else 1, None, 0
        else:
            tokens, n_rows = row_tokens(data.train_rows), len(data.train_rows)
            costs = tokens if self.by_tokens else row_examples(data.train_rows)
            size = costs * n_rows if isinstance(costs, int) else int(costs.sum())
        weight = [(0.0, float(size))] if source.weight is None else source.weight
        max_rows = source.epochs and n_rows and source.epochs * n_rows
        if source.cap is not None and source.cap < int(np.min(costs)):
            raise ConfigError(f"{name}.cap={source.cap}: less than a row of {int(np.min(costs))}; raise it")
        return SourcePlan(source.name, weight, n_rows, costs, tokens, max_rows, source.cap)

    def mixture(self) -> Mixture:
        """The schedule of the run at its beginning."""
        plan = self.batch_plan()
        return Mixture(
            self.plans,
            total_rows=self.expected_batches * plan.batch_size * plan.world_size,
            seed=self.seed,
            shuffle=self.shuffle,
            temperature=self.temperature,
        )

    def train_dataloader(self) -> StreamLoader:
        plan = self.batch_plan()
        self._check_length(plan.batch_size * plan.world_size)
        rows = {n: source.data.train_rows for n, source in enumerate(self.sources) if not source.data.streaming}
        streams = {}
        for n, source in enumerate(self.sources):
            source.data.trainer = self.trainer  # which decides on ranks
            if source.data.streaming:
                streams[n] = source.data.stream()
        self._stream = MixedStream(self.mixture, rows, streams, self.collate, plan, n_batches=self.n_batches)
        return StreamLoader(self._stream, self.n_batches)

    def _check_length(self, rows_of_batch: int) -> None:
        """ConfigError where all sources end before the run does."""
        limits = [n_rows_at_most(plan) for plan in self.plans]
        needed, given = self.expected_batches * rows_of_batch, sum(limit or 0 for limit in limits)
        if None not in limits and given < needed:
            steps = given // rows_of_batch
            raise ConfigError(
                f"data.sources: all end by epochs or cap after {given:,} rows, and the run takes {needed:,}; lower "
                f"trainer.max_steps to what {steps:,} batches give, or leave one without an end"
            )

    def val_dataloader(self) -> DataLoader:
        """Batches of one source each, in turn, so that a limited validation is of all sources."""
        plan, first, batches = self.batch_plan(), 0, []
        for source in self.sources:
            with naming(source.name):
                own = validation_batches(
                    len(source.data.val_rows), self.val_batch_size, plan, min_rows=self.min_batch_rows
                )
            batches.append([[(epoch, first + row) for epoch, row in batch] for batch in own])
            first += len(source.data.val_rows)
        in_turn = [batch for turn in zip_longest(*batches) for batch in turn if batch is not None]
        return DataLoader(
            NumberedRows(self.val_rows),
            batch_sampler=in_turn,
            collate_fn=lambda rows: with_sources(rows, self.collate),
            generator=torch.Generator().manual_seed(0),
        )

    def summary(self) -> str:
        """One line on the mixture, and one for each source."""
        unit = "tokens" if self.by_tokens else "examples"
        lines = [f"{len(self.sources)} sources, mixed by {unit}, each within one row of its share"]
        for source, plan, share in zip(self.sources, self.plans, self.mixture().weights(), strict=True):
            terms = [f"{share:.2%} of {unit}"]
            if len(plan.weight) > 1:
                terms.append("weight " + ", ".join(f"{weight:g} at {x:.0%}" for x, weight in plan.weight))
            terms += [f"{source.epochs} epoch{'s' * (source.epochs > 1)} at most"] if source.epochs else []
            terms += [f"{source.cap:,} {unit} at most"] if source.cap else []
            lines.append(f"{'':<12}{source.name}: {', '.join(terms)}; {source.data.summary()}")
        return "\n".join(lines)

    def prompt(self) -> str:
        return self.sources[0].data.prompt()

    def mixture_metrics(self) -> dict[str, float]:
        """Tokens of each source so far over all ranks, without padding, and its share of what is weighed."""
        if self._stream is None:
            return {}
        progress = self._stream.progress
        total = max(1, sum(progress.spent))
        tokens = {f"train/tokens_seen/{name}": n for name, n in zip(self.source_names, progress.tokens, strict=True)}
        return tokens | {
            f"train/share/{name}": n / total for name, n in zip(self.source_names, progress.spent, strict=True)
        }

    def mixture_lines(self) -> list[str]:
        """What each source has given: tokens, share and what it was to be, passes."""
        if self._stream is None:
            return []
        progress, lines = self._stream.progress, []
        total = max(1, sum(progress.spent))
        for n, name in enumerate(self.source_names):
            share, aim = progress.spent[n] / total, (progress.spent[n] + progress.lags[n]) / total
            passes = "" if (done := progress.passes(n)) is None else f", {done:.2f} passes"
            end = ", ended" if progress.ended(n) else ""
            lines.append(
                f"mixed       {name}: {progress.tokens[n]:,} tokens, {share:.3%} (to be {aim:.3%}){passes}{end}"
            )
        return lines


class NumberedRows(KeyedExamples):
    """The rows of several data sets end to end by (epoch, index), each with the number of its data set."""

    rows: ConcatDataset

    def __getitem__(self, key: tuple[int, int]) -> dict[str, object]:
        source = int(np.searchsorted(self.rows.cumulative_sizes, key[1], side="right"))
        return {**super().__getitem__(key), NUMBER: source}


def n_rows_at_most(plan: SourcePlan) -> int | None:
    """Rows after which a source ends; None where it never does."""
    limits = [plan.max_rows] if plan.max_rows is not None else []
    if plan.cap is not None and isinstance(plan.costs, int):
        limits.append(plan.cap // plan.costs)
    elif plan.cap is not None:  # rows of any length: as many as their mean gives
        limits.append(int(plan.cap // np.mean(plan.costs)))
    return min(limits) if limits else None


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Context in which an error about an option of `data` is about that of a source."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(OPTION.sub(f"data.sources.{source}.", str(error))) from None
