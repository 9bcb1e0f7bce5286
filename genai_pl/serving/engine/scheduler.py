"""How an engine reads prompts: a chunk of a long one between two steps, or several short ones in one pass."""

import logging
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from genai_pl.serving.engine.request_state import RequestState, isolate_failure, n_packed, prefill_packed, share_cache

if TYPE_CHECKING:
    from genai_pl.serving.engine.engine import Engine

log = logging.getLogger("genai_pl.serving")
SPARE = 4  # slots to one spare place


def prefill(engine: "Engine") -> None:
    """Read prompts, at most a chunk of tokens in all; what is read to its end has its first token and joins the batch."""
    budget = engine.chunk_tokens
    while budget > 0 and _next(engine, budget):
        states, before = list(engine.prefilling), sum(state.n_prefilled for state in engine.prefilling)
        try:
            engine.adapters.activate([states[0].request.adapter])
            logits = (
                prefill_packed(states, engine.device)
                if len(states) > 1
                else states[0].prefill_chunk(budget, engine.device)
            )
            budget -= sum(state.n_prefilled for state in states) - before
            if logits is None:
                engine.paused.append(states[0])
                engine.prefilling = []
                continue
            engine.append_tokens(logits, states)
            _start_decoding(engine, states)
        except Exception:
            log.exception("a prompt cannot be read: its answer ends")
            _fail(engine)
        engine.prefilling = []


def _next(engine: "Engine", budget: int) -> bool:
    """Whether there are rows to read now: newcomers and those that are read in part take turns."""
    admits_new, engine.new_requests_first = engine.new_requests_first, not engine.new_requests_first
    if admits_new and _admit(engine, budget):
        return True
    if engine.paused:
        engine.prefilling = [engine.paused.popleft()]
        return True
    return not admits_new and _admit(engine, budget)


def _start_decoding(engine: "Engine", states: list[RequestState]) -> None:
    """Let rows that are read take part in steps, unless they are over."""
    for state in states:
        if state.finish_reason is None:
            engine.model_runner.add_request(state)
        else:
            engine.finish(state)
        engine.prefilling.remove(state)


def _admit(engine: "Engine", budget: int) -> bool:
    """Whether the next request has begun to be read, with others whose prompts are read in the same pass."""
    engine.prefilling = engine.take_waiting(lambda: _select(engine, budget if engine.model_runner.packs_prompts else 0))
    if not engine.prefilling:
        return False
    try:
        engine.adapters.activate([engine.prefilling[0].request.adapter])  # virtual tokens have room where they are on
        for state in list(engine.prefilling):
            _start(engine, state)
        if engine.prefilling:
            several, first = len(engine.prefilling) > 1, engine.prefilling[0]
            n_tokens = sum(len(state.prompt) for state in engine.prefilling)
            share_cache(
                engine.prefilling, n_tokens if several else engine.model_runner.cache_capacity(first, engine.max_length)
            )
            return True
    except Exception:
        log.exception("a request cannot begin")
        _fail(engine)
    return _admit(engine, budget)


def _select(engine: "Engine", budget: int) -> list[RequestState]:
    """Those that begin now: as many as slots are free, or one that has a spare place when none is."""
    states, free = eligible(engine), engine.slots - engine.n_running
    if free > 0:
        return states[: n_packed(states, free, budget)]
    if engine.n_running >= engine.max_running:
        return []
    return [state for state in states if may_use_spare_slot(engine, state)][:1]


def n_spare_slots(slots: int) -> int:
    """How many rows there may be beyond the slots."""
    return -(-slots // SPARE)


def may_use_spare_slot(engine: "Engine", state: RequestState) -> bool:
    """Whether a row may have a spare place: nothing runs for its client, or for its request, which is over by the time
    that a slot is free."""
    running = engine.running()
    if all(state.request.client != other.request.client for other in running):
        return True
    if state.request.group is not None and any(state.request.group is other.request.group for other in running):
        return False
    return state.config.max_new_tokens < min(other.n_remaining for other in running)


def eligible(engine: "Engine") -> list[RequestState]:
    """Those that wait, in the order of their turns.

    Of one client's, what has less for its request comes first: one with many prompts is read beside others, not before.
    """
    running = Counter(id(state.request.group) for state in engine.running())
    waiting, ranks, lines = list(engine.waiting), {}, defaultdict(list)
    for state in waiting:
        group = id(state.request.group)
        ranks[id(state)] = 0 if state.request.group is None else running[group]
        running[group] += 1
        lines[state.request.client].append(state)
    turns = {client: iter(sorted(line, key=lambda state: ranks[id(state)])) for client, line in lines.items()}
    return [next(turns[state.request.client]) for state in waiting]


def _start(engine: "Engine", state: RequestState) -> None:
    """Get a row ready, or end it."""
    engine.observer.started(time.monotonic() - state.submit_time)
    with isolate_failure(state):
        state.start(engine.model, engine.tokenizer, engine.device)
    if state.finish_reason:
        engine.prefilling.remove(state)
        engine.finish(state)


def _fail(engine: "Engine") -> None:
    for state in engine.prefilling:
        engine.finish(state, "error")
    engine.prefilling = []
