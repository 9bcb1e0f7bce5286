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
from genai_pl.serving.engine.request_state import RequestState, isolate_failure

log = logging.getLogger("genai_pl.serving")


class AdapterSelector:
    """The adapters that requests choose among; those that the model had already stay as they are."""

    def __init__(self, model: nn.Module, folders: Mapping[str, str]) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.own_end_tokens: dict[str, list[int]] = {}  # tokens that end what one of them writes
        self.config = model.config
        self.device = next(model.parameters()).device
        self.active: list[str | None] = []
        for name, folder in folders.items():
            load_adapter(model, Path(folder))
            self.adapters[name] = adapters_of(model)[-1]
            self.own_end_tokens[name] = end_token_ids(read_generation_defaults(Path(folder)))
        model.to(self.device).eval()

    def end_tokens(self, name: str | None) -> set[int]:
        """The tokens that end a text of the model with the adapter of that name, or with none."""
        own = self.own_end_tokens.get(name, ())
        return {*self.config.eos_token_ids, *(i for i in own if 0 <= i < self.config.vocab_size)}

    def activate(self, names: Sequence[str | None]) -> None:
        """Give each row of the next batch the adapter of its name, or none."""
        if not self.adapters or names == self.active:
            return
        self.active = list(names)
        for name, adapter in self.adapters.items():
            weights = [float(row_name == name) for row_name in names]
            alike = len(set(weights)) == 1  # a number is faster than one per row
            adapter.weight = weights[0]
            adapter.rows = None if alike else torch.tensor(weights, device=self.device)


class BatchedModelRunner:
    """One pass of the model for all rows, out of one cache."""

    prefills_whole_prompts, packs_prompts = False, True

    def __init__(self, model: Decoder, adapters: AdapterSelector, slots: int) -> None:
        self.model, self.adapters, self.cache = model, adapters, SlotCache(slots)
        self.states: list[RequestState] = []

    def cache_capacity(self, state: RequestState, max_length: int) -> int:
        """How many tokens the row's own cache is for: those of the prompt."""
        return len(state.prompt)

    def add_request(self, state: RequestState) -> None:
        """Take in a row that has read its prompt."""
        self.cache.add_sequence(state.cache, state.cache_start, state.cache_end)
        state.cache = None
        self.states.append(state)

    def remove_request(self, n: int) -> RequestState:
        """Row n, which is over; the last one takes its place."""
        state = self.states[n]
        self.cache.remove_sequence(n, clean=state.finish_reason == "error")
        _remove(self.states, n)
        return state

    def clear(self) -> list[RequestState]:
        """All rows, which are over."""
        self.cache.clear()
        states, self.states = self.states, []
        return states

    def decode(self) -> Tensor:
        """The logits (B, V) of what follows the last token of each row."""
        self.adapters.activate([state.request.adapter for state in self.states])
        self.cache.ensure_capacity()
        tokens = torch.tensor([[state.output_ids[-1]] for state in self.states], device=self.adapters.device)
        return self.model.logits(self.model.features(tokens, cache=self.cache)[:, -1])


class PerRequestModelRunner:
    """A pass for each row: for models whose rows are not read alike wherever in a cache they lie."""

    packs_prompts = False

    def __init__(self, adapters: AdapterSelector, *, prefills_whole_prompts: bool) -> None:
        self.adapters, self.prefills_whole_prompts = adapters, prefills_whole_prompts
        self.states: list[RequestState] = []

    def cache_capacity(self, state: RequestState, max_length: int) -> int:
        """How many tokens the row's own cache is for: all that it may read."""
        return min(len(state.prompt) + state.config.max_new_tokens, max_length)

    def add_request(self, state: RequestState) -> None:
        """Take in a row that has read its prompt."""
        self.states.append(state)

    def remove_request(self, n: int) -> RequestState:
        """Row n, which is over; the last one takes its place."""
        state = self.states[n]
        _remove(self.states, n)
        return state

    def clear(self) -> list[RequestState]:
        """All rows, which are over."""
        states, self.states = self.states, []
        return states

    def decode(self) -> Tensor:
        """The logits (B, V) of what follows the last token of each row."""
        return torch.cat([self._decode_isolated(state) for state in self.states])

    def _decode_isolated(self, state: RequestState) -> Tensor:
        """The logits (1, V) of a row; one whose pass fails is over."""
        with isolate_failure(state):
            return self._decode_one(state)
        return torch.zeros(1, state.model.config.vocab_size, device=self.adapters.device)

    def _decode_one(self, state: RequestState) -> Tensor:
        self.adapters.activate([state.request.adapter])
        token = torch.tensor([[state.output_ids[-1]]], device=self.adapters.device)
        return state.model.logits(state.model.features(token, cache=state.cache)[:, -1])


def make_model_runner(
    model: Model | WrappedDecoder, adapters: AdapterSelector, slots: int
) -> BatchedModelRunner | PerRequestModelRunner:
    """The rows of an engine, all in one pass of the model if they can be."""
    reason = unbatchable_reason(model)
    if reason is None:
        return BatchedModelRunner(model, adapters, slots)
    log.info("serving: a pass of the model for each row, because %s", reason)
    return PerRequestModelRunner(adapters, prefills_whole_prompts=model.config.attention_kind is not AttentionKind.full)


def unbatchable_reason(model: Model | WrappedDecoder) -> str | None:
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


def _remove(states: list[RequestState], n: int) -> None:
    states[n] = states[-1]
    states.pop()
