"""The rows that get their next token together, with their caches."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind
from genai_pl.data.generation_defaults import end_token_ids, read_generation_defaults
from genai_pl.models import Decoder, Model, WrappedDecoder
from genai_pl.models.kv_cache import SlotCache
from genai_pl.models.onnx.model import OnnxDecoder
from genai_pl.peft import Adapter, adapters_of, load_adapter
from genai_pl.serving.engine.request_state import Row, ending_alone

log = logging.getLogger("genai_pl.serving")


class Adapters:
    """The adapters that requests choose among; those that the model had already stay as they are."""

    def __init__(self, model: nn.Module, folders: Mapping[str, str]) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.own_ends: dict[str, list[int]] = {}  # tokens that end what one of them writes
        self.config = model.config
        self.device = next(model.parameters()).device
        self.chosen: list[str | None] = []
        for name, folder in folders.items():
            load_adapter(model, Path(folder))
            self.adapters[name] = adapters_of(model)[-1]
            self.own_ends[name] = end_token_ids(read_generation_defaults(Path(folder)))
        model.to(self.device).eval()

    def ends(self, name: str | None) -> set[int]:
        """The tokens that end a text of the model with the adapter of that name, or with none."""
        own = self.own_ends.get(name, ())
        return {*self.config.eos_token_ids, *(i for i in own if 0 <= i < self.config.vocab_size)}

    def choose(self, names: Sequence[str | None]) -> None:
        """Give each row of the next batch the adapter of its name, or none."""
        if not self.adapters or names == self.chosen:
            return
        self.chosen = list(names)
        for name, adapter in self.adapters.items():
            weights = [float(wanted == name) for wanted in names]
            alike = len(set(weights)) == 1  # a number is faster than one per row
            adapter.weight = weights[0]
            adapter.rows = None if alike else torch.tensor(weights, device=self.device)


class Together:
    """One pass of the model for all rows, out of one cache."""

    whole_prompts, packs = False, True

    def __init__(self, model: Decoder, adapters: Adapters, slots: int) -> None:
        self.model, self.adapters, self.cache = model, adapters, SlotCache(slots)
        self.rows: list[Row] = []

    def room(self, row: Row, max_length: int) -> int:
        """How many tokens the row's own cache is for: those of the prompt."""
        return len(row.prompt)

    def join(self, row: Row) -> None:
        """Take in a row that has read its prompt."""
        self.cache.add_sequence(row.cache, row.begin, row.end_of_prompt)
        row.cache = None
        self.rows.append(row)

    def leave(self, n: int) -> Row:
        """Row n, which is over; the last one takes its place."""
        row = self.rows[n]
        self.cache.remove_sequence(n, clean=row.ending == "error")
        _remove(self.rows, n)
        return row

    def clear(self) -> list[Row]:
        """All rows, which are over."""
        self.cache.clear()
        rows, self.rows = self.rows, []
        return rows

    def read(self) -> Tensor:
        """The logits (B, V) of what follows the last token of each row."""
        self.adapters.choose([row.request.adapter for row in self.rows])
        self.cache.ensure_capacity()
        tokens = torch.tensor([[row.written[-1]] for row in self.rows], device=self.adapters.device)
        return self.model.logits(self.model.features(tokens, cache=self.cache)[:, -1])


class Apart:
    """A pass for each row: for models whose rows are not read alike wherever in a cache they lie."""

    packs = False

    def __init__(self, adapters: Adapters, *, whole_prompts: bool) -> None:
        self.adapters, self.whole_prompts = adapters, whole_prompts
        self.rows: list[Row] = []

    def room(self, row: Row, max_length: int) -> int:
        """How many tokens the row's own cache is for: all that it may read."""
        return min(len(row.prompt) + row.config.max_new_tokens, max_length)

    def join(self, row: Row) -> None:
        """Take in a row that has read its prompt."""
        self.rows.append(row)

    def leave(self, n: int) -> Row:
        """Row n, which is over; the last one takes its place."""
        row = self.rows[n]
        _remove(self.rows, n)
        return row

    def clear(self) -> list[Row]:
        """All rows, which are over."""
        rows, self.rows = self.rows, []
        return rows

    def read(self) -> Tensor:
        """The logits (B, V) of what follows the last token of each row."""
        return torch.cat([self._read_alone(row) for row in self.rows])

    def _read_alone(self, row: Row) -> Tensor:
        """The logits (1, V) of a row; one whose pass fails is over."""
        with ending_alone(row):
            return self._read(row)
        return torch.zeros(1, row.model.config.vocab_size, device=self.adapters.device)

    def _read(self, row: Row) -> Tensor:
        self.adapters.choose([row.request.adapter])
        token = torch.tensor([[row.written[-1]]], device=self.adapters.device)
        return row.model.logits(row.model.features(token, cache=row.cache)[:, -1])


def make_batch(model: Model | WrappedDecoder, adapters: Adapters, slots: int) -> Together | Apart:
    """The rows of an engine, all in one pass of the model if they can be."""
    reason = why_apart(model)
    if reason is None:
        return Together(model, adapters, slots)
    log.info("serving: a pass of the model for each row, because %s", reason)
    return Apart(adapters, whole_prompts=model.config.attention_kind is not AttentionKind.full)


def why_apart(model: Model | WrappedDecoder) -> str | None:
    """Why rows of this model cannot share a cache; None where they can."""
    if isinstance(model, WrappedDecoder):
        return "transformers runs the model"
    if isinstance(model, OnnxDecoder):
        return "ONNX Runtime runs the model"
    if not isinstance(model, Decoder):
        return "each row reads a text of its own"
    if model.config.attention_kind is not AttentionKind.full:
        return f"model.attention_kind={model.config.attention_kind.value} goes by places in the cache"
    return None if model.virtual is None else "there are virtual tokens in front of rows"


def _remove(rows: list[Row], n: int) -> None:
    rows[n] = rows[-1]
    rows.pop()
