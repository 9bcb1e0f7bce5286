"""Model runners: prefill and decode passes of the requests that run, with their KV caches."""

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genai_pl.config.enums import AttentionKind
from genai_pl.generation.prefix_cache import PrefixBlocks
from genai_pl.models import Decoder, Model, WrappedDecoder
from genai_pl.models.kv_cache import SlotCache
from genai_pl.models.onnx.model import OnnxDecoder
from genai_pl.peft import Adapter
from genai_pl.serving.engine.adapter_selector import AdapterSelector
from genai_pl.serving.engine.request_state import RequestState, isolate_failure

log = logging.getLogger("genai_pl.serving")


class ModelRunner(ABC):
    """The requests that decode, `states`, and the passes of the model for them.

    adapters: switches the model to the adapter of each request during a pass
    max_length: tokens of prompt and answer together that one request may have
    packs_prompts: several short prompts can be read in one pass, as documents of one packed row
    prefills_whole_prompts: a prompt cannot be read in chunks
    prefix_blocks: where prompts and answers are kept for later requests that begin with them; None keeps nothing

    The two subclasses differ in where keys and values live while a request decodes. Prefill is the same for both: a request
    reads its prompt into a cache of its own (or one that a few requests share), and joins the decode batch afterwards.
    """

    packs_prompts = False
    prefix_blocks: PrefixBlocks | None = None
    prefills_whole_prompts = False

    def __init__(self, adapters: AdapterSelector, *, max_length: int) -> None:
        self.adapters, self.max_length = adapters, max_length
        self.states: list[RequestState] = []

    def allocate(self, states: list[RequestState]) -> None:
        """Give requests whose prompts are read in one pass a KV cache for it, prompt after prompt in one row.

        Their adapter must be selected: virtual tokens of prefix tuning take columns of the cache, too.
        """
        share_cache(states, self.prefill_capacity(states))

    def prefill(self, states: list[RequestState], budget: int) -> tuple[Tensor | None, int]:
        """Read whole prompts, or a chunk of at most `budget` tokens of the only one.

        Returns the logits (B, V) that follow the prompts, None as long as the only one is not complete, and how many tokens
        the pass read.
        """
        self.restore(states)
        before = sum(state.n_prefilled for state in states)
        with self.adapters.selected([states[0].request.adapter]):
            if len(states) > 1:
                logits = prefill_packed(states, self.adapters.device)
            else:
                logits = states[0].prefill_chunk(budget, self.adapters.device)
        return logits, sum(state.n_prefilled for state in states) - before

    def n_cached(self, state: RequestState) -> int:
        """Tokens of the prompt that need not be read, because an earlier request began with them."""
        return 0

    def restore(self, states: list[RequestState]) -> None:
        """Fill in keys and values that earlier requests have computed, before a pass that reads these prompts."""
        return

    def add_request(self, state: RequestState) -> None:
        """Let a request whose prompt is complete take part in decode steps."""
        self.states.append(state)

    def remove_request(self, n: int) -> RequestState:
        """Take request n out of the batch; the last one gets its number, so that no row of a cache has to move but one."""
        state = self.states[n]
        self.states[n] = self.states[-1]
        self.states.pop()
        return state

    def clear(self) -> list[RequestState]:
        """Take all requests out, after a pass that failed."""
        states, self.states = self.states, []
        return states

    def release(self) -> None:
        """Free what no request uses, while there is none."""
        return

    @abstractmethod
    def prefill_capacity(self, states: list[RequestState]) -> int:
        """Tokens that the cache of a prefill pass must hold."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The logits (B, V) that follow the newest token of each request, in the order of `states`."""


class BatchedModelRunner(ModelRunner):
    """One decode pass for all requests, out of one SlotCache of `slots` rows.

    All sequences of a SlotCache end in the same column (left padding), so a step writes one column and the model reads the
    batch as it reads left-padded prompts. Row n of the cache belongs to `states[n]`: add_request and remove_request change
    both in the same way.
    """

    packs_prompts = True

    def __init__(
        self,
        model: Decoder,
        adapters: AdapterSelector,
        *,
        slots: int,
        max_length: int,
        prefix_blocks: PrefixBlocks | None = None,
    ) -> None:
        super().__init__(adapters, max_length=max_length)
        self.model, self.cache, self.prefix_blocks = model, SlotCache(slots), prefix_blocks

    def prefill_capacity(self, states: list[RequestState]) -> int:
        """Tokens of the prompts: the answer's keys and values go to the SlotCache."""
        return sum(len(state.prompt) for state in states)

    def add_request(self, state: RequestState) -> None:
        """Copy the prompt's keys and values into a row of the SlotCache, and drop the prefill cache."""
        self.cache.add_sequence(state.cache, state.cache_start, state.cache_end)
        state.cache = None
        self._keep(len(self.states), state)
        super().add_request(state)

    def remove_request(self, n: int) -> RequestState:
        """Take request n and its cache row out; a row that failed is wiped, since a NaN in padding would spread."""
        failed = self.states[n].finish_reason == "error"
        if not failed:
            self._keep(n, self.states[n])
        self.cache.remove_sequence(n, clean=failed)
        return super().remove_request(n)

    def n_cached(self, state: RequestState) -> int:
        """Tokens of the prompt that need not be read."""
        return 0 if self.prefix_blocks is None else self.prefix_blocks.n_cached(self._root(state), state.prompt)

    def restore(self, states: list[RequestState]) -> None:
        """Copy the blocks of one request's prompt that are kept; prompts that are packed into one row have none.

        Each chunk looks again: another request may have read the rest of the prompt since the last one.
        """
        if self.prefix_blocks is not None and len(states) == 1:
            [state] = states
            n = self.prefix_blocks.restore(self._root(state), state.prompt, state.cache)
            state.n_prefilled += n
            state.stream.n_cached += n

    def _keep(self, row: int, state: RequestState) -> None:
        """Keep the text of a row of the SlotCache, all that was read of it; the newest token was not."""
        if self.prefix_blocks is not None:
            tokens = [*state.prompt, *state.output_ids[:-1]]
            columns = slice(self.cache.first_columns[row], self.cache.next_column)
            k, v = self.cache.k[:, row, :, columns], self.cache.v[:, row, :, columns]
            self.prefix_blocks.store(self._root(state), tokens, k, v)

    def _root(self, state: RequestState) -> str:
        return prefix_root(self.adapters.adapters.get(state.request.adapter))

    def clear(self) -> list[RequestState]:
        """Take all requests out and free the SlotCache, whose contents are unknown after a failed pass."""
        self.cache.clear()
        return super().clear()

    def release(self) -> None:
        """Free the SlotCache, if it has no rows: it is as large as the longest requests have made it."""
        if not self.states:
            self.cache.clear()

    def decode(self) -> Tensor:
        """The logits (B, V) of one pass over the newest tokens (B, 1)."""
        self.cache.ensure_capacity()
        tokens = torch.tensor([[state.output_ids[-1]] for state in self.states], device=self.adapters.device)
        with self.adapters.selected([state.request.adapter for state in self.states]):
            return self.model.logits(self.model.features(tokens, cache=self.cache)[:, -1])


class PerRequestModelRunner(ModelRunner):
    """A decode pass for each request, out of a cache of its own.

    For models whose result depends on the column in which a token stands (windows with global tokens, LSH), that attend to
    something else than the cache (encoder-decoders, virtual tokens), or that another library runs.
    """

    def __init__(self, adapters: AdapterSelector, *, max_length: int, prefills_whole_prompts: bool) -> None:
        super().__init__(adapters, max_length=max_length)
        self.prefills_whole_prompts = prefills_whole_prompts

    def prefill_capacity(self, states: list[RequestState]) -> int:
        """Tokens of the prompt and of the longest answer, of the one request that a pass has here."""
        [state] = states
        return min(len(state.prompt) + state.config.max_new_tokens, self.max_length)

    def decode(self) -> Tensor:
        """The logits (B, V) of B passes over one token each."""
        return torch.cat([self._decode_isolated(state) for state in self.states])

    def _decode_isolated(self, state: RequestState) -> Tensor:
        """The logits (1, V) of a request; zeros for one whose pass fails, which has its finish_reason then."""
        with isolate_failure(state), self.adapters.selected([state.request.adapter]):
            token = torch.tensor([[state.output_ids[-1]]], device=self.adapters.device)
            return state.model.logits(state.model.features(token, cache=state.cache)[:, -1])
        return torch.zeros(1, state.model.config.vocab_size, device=self.adapters.device)


def make_model_runner(
    model: Model | WrappedDecoder,
    adapters: AdapterSelector,
    *,
    slots: int,
    max_length: int,
    prefix_blocks: PrefixBlocks | None = None,
) -> ModelRunner:
    """The batched runner where the model allows it; otherwise one pass per request, and the log says why."""
    reason = unbatchable_reason(model)
    if reason is None:
        options = {"slots": slots, "max_length": max_length, "prefix_blocks": prefix_blocks}
        return BatchedModelRunner(model, adapters, **options)
    log.info("serving: a pass of the model for each row, because %s", reason)
    is_chunkable = model.config.attention_kind is AttentionKind.full
    return PerRequestModelRunner(adapters, max_length=max_length, prefills_whole_prompts=not is_chunkable)


def unbatchable_reason(model: Model | WrappedDecoder) -> str | None:
    """Why sequences of this model cannot share a SlotCache, as the end of a log line; None where they can."""
    if isinstance(model, WrappedDecoder):
        return "transformers runs the model"
    if isinstance(model, OnnxDecoder):
        return "ONNX Runtime runs the model"
    if not isinstance(model, Decoder):
        return "each row reads a text of its own"
    if model.config.attention_kind is not AttentionKind.full:
        return f"model.attention_kind={model.config.attention_kind.value} goes by places in the cache"
    return None if model.virtual is None else "there are virtual tokens in front of rows"


def prefix_root(adapter: Adapter | None) -> str:
    """What keys and values depend on besides tokens: the adapter, which has another number once it is loaded again."""
    return "base" if adapter is None else f"adapter {adapter.number}"


def share_cache(states: list[RequestState], capacity: int) -> None:
    """Give requests one KV cache of one row and `capacity` tokens, in which each prompt has the columns after the last."""
    cache, start = states[0].model.new_cache(1, capacity), 0
    for state in states:
        state.cache, state.cache_start = cache, start
        start = state.cache_end


def prefill_packed(states: list[RequestState], device: torch.device) -> Tensor:
    """The logits (B, V) that follow each prompt, all prompts read as the documents of one packed row (1, T)."""
    # one row: segment ids 1, 1, 1, 2, 2, ... keep prompts from attending to each other
    input_ids = torch.tensor([[token for state in states for token in state.prompt]], device=device)
    documents = [[n + 1] * len(state.prompt) for n, state in enumerate(states)]
    segment_ids = torch.tensor([[n for document in documents for n in document]], device=device)
    hidden = states[0].model.features(input_ids, segment_ids, cache=states[0].cache)
    for state in states:
        state.n_prefilled = len(state.prompt)
    # the hidden state of each prompt's last token
    logits = states[0].model.logits(hidden[0, [state.cache_end - 1 for state in states]])
    if logits.amax().isfinite():
        return logits
    # a NaN of one prompt reaches all of the pass (0 * NaN in masked attention): read each alone to find the one
    for state in states:
        state.n_prefilled = 0
        share_cache([state], len(state.prompt))
    return torch.cat([state.prefill_chunk(len(state.prompt), device) for state in states])
