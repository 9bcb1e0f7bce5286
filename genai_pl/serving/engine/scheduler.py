"""Scheduler: which requests wait, which read their prompts, and which prompt tokens the next prefill pass reads."""

import logging
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from itertools import islice

from genai_pl.serving.engine.model_runner import ModelRunner
from genai_pl.serving.engine.request_state import RequestState
from genai_pl.serving.fair_queue import FairQueue

log = logging.getLogger("genai_pl.serving")
SLOTS_PER_SPARE = 4  # one spare slot for this many slots, rounded up


class Scheduler:
    """The life of a request before it decodes: waiting -> prefilling <-> paused -> the model runner's batch.

    model_runner: the batch that requests join after prefill; its requests count as running
    slots: requests that run at once
    queue_size: requests that wait at most
    lock: held while `waiting` is read or changed, since threads that submit requests share it
    start: called for a request when it gets a slot; it sets `finish_reason` where the request cannot start
    finish: called for a request that ends here, with a finish reason or with None where the request has one

    Three rules decide who runs. Clients take turns by tokens (FairQueue). New requests and half-read prompts alternate, so
    that a long prompt neither blocks short ones nor is starved by them. Beyond the slots, a quarter as many spare ones
    are reserved for requests that would otherwise wait for a client that holds all slots: see `may_use_spare_slot`.
    """

    def __init__(
        self,
        model_runner: ModelRunner,
        *,
        slots: int,
        queue_size: int,
        lock: threading.Condition,
        start: Callable[[RequestState], None],
        finish: Callable[[RequestState, str | None], None],
    ) -> None:
        self.model_runner, self.slots, self.lock = model_runner, slots, lock
        self.start, self.finish = start, finish
        self.max_running = slots + n_spare_slots(slots)
        self.waiting: FairQueue[RequestState] = FairQueue(queue_size, lambda state: state.n_tokens)
        self.prefilling: list[RequestState] = []  # of the current pass: one, or several that are packed into one row
        self.paused: deque[RequestState] = deque()  # prompts that are read in part, the next one first
        self.new_requests_first = True  # in the next pass; otherwise the first of `paused`

    def running(self) -> list[RequestState]:
        """The requests that have a slot: decoding, prefilling and paused."""
        return [*self.model_runner.states, *self.prefilling, *self.paused]

    def schedule(self, budget: int) -> list[RequestState]:
        """The requests of the next prefill pass of at most `budget` tokens; none if there is nothing to read.

        Several requests are read whole in one pass; of a single one the pass may read a chunk.
        """
        new_first, self.new_requests_first = self.new_requests_first, not self.new_requests_first
        if new_first and self.admit(budget):
            return self.prefilling
        if self.paused:
            self.prefilling = [self.paused.popleft()]
        elif not new_first:
            self.admit(budget)
        return self.prefilling

    def admit(self, budget: int) -> bool:
        """Move waiting requests to `prefilling`, with a cache; True if one or more were, False if none may start now.

        A request that cannot start is finished, and the next one is tried.
        """
        # a budget of 0 admits exactly one request
        while self._dequeue_next(budget if self.model_runner.packs_prompts else 0):
            adapter = self.prefilling[0].request.adapter
            try:
                # `start` may run an encoder, and `allocate` counts virtual tokens: both depend on the adapter
                with self.model_runner.adapters.selected([adapter]):
                    for state in list(self.prefilling):
                        self.start(state)
                        if state.finish_reason:
                            self.prefilling.remove(state)
                            self.finish(state, None)
                    if self.prefilling:
                        self.model_runner.allocate(self.prefilling)
                        return True
            except Exception:
                log.exception("a request cannot begin")
                self.fail_prefill()
        return False

    def pause(self) -> None:
        """Put the prompt of the current pass, which is not complete, after the other half-read ones."""
        self.paused += self.prefilling
        self.prefilling = []

    def start_decoding(self) -> None:
        """Move the requests of the current pass to the decode batch, or finish those that have ended with one token."""
        while self.prefilling:
            state = self.prefilling[0]
            if state.finish_reason is None:
                self.model_runner.add_request(state)
            else:
                self.finish(state, None)
            self.prefilling.pop(0)

    def fail_prefill(self) -> None:
        """Finish the requests of the current pass with "error"."""
        for state in self.prefilling:
            self.finish(state, "error")
        self.prefilling = []

    def remove_stopped(self, now: float) -> list[RequestState]:
        """Take out the waiting and paused requests that are cancelled or past their deadline (`now` is monotonic)."""
        stopped = []
        with self.lock:
            for state in list(self.waiting):
                state.check_stopped(now)
                if state.finish_reason and self.waiting.remove(state.request.client, state):
                    stopped.append(state)
        for state in list(self.paused):
            state.check_stopped(now)
            if state.finish_reason:
                self.paused.remove(state)
                stopped.append(state)
        return stopped

    def dequeue(self, states: list[RequestState]) -> list[RequestState]:
        """Remove the requests from the queue and charge their clients; returns them unchanged."""
        with self.lock:
            for state in states:
                self.waiting.dequeue(state.request.client, state)
        return states

    def in_turn(self) -> list[RequestState]:
        """The waiting requests in the order in which they may start.

        The order of clients is the fair queue's. Of one client's requests those come first whose group (the answers to one
        HTTP request) has the fewest running or earlier ones, so that a request for many answers is read beside the client's
        others, not before them.
        """
        # rank of each request: how many of its group run or wait before it
        running = Counter(id(state.request.group) for state in self.running())
        waiting, ranks, lines = list(self.waiting), {}, defaultdict(list)
        for state in waiting:
            group = id(state.request.group)
            ranks[id(state)] = 0 if state.request.group is None else running[group]
            running[group] += 1
            lines[state.request.client].append(state)
        # every turn of a client goes to its request of the lowest rank
        turns = {client: iter(sorted(line, key=lambda state: ranks[id(state)])) for client, line in lines.items()}
        return [next(turns[state.request.client]) for state in waiting]

    def may_use_spare_slot(self, state: RequestState) -> bool:
        """True if nothing runs for the request's client, or no other request of its group runs, and it will finish before any
        running request.
        """
        running = self.running()
        if all(state.request.client != other.request.client for other in running):
            return True
        if state.request.group is not None and any(state.request.group is other.request.group for other in running):
            return False
        return state.config.max_new_tokens < min(other.n_remaining for other in running)

    def _dequeue_next(self, budget: int) -> bool:
        """Fill `prefilling` with waiting requests, up to `budget` tokens in all, or a single longer one.

        True if `prefilling` has a request, False if none may start.
        """
        with self.lock:  # nobody may cancel a request between its choice and its removal from the queue
            self.prefilling = self.dequeue(self._select(budget))
        return bool(self.prefilling)

    def _select(self, budget: int) -> list[RequestState]:
        """The waiting requests that start next: as many as `n_packed` for free slots, at most one for a spare slot."""
        states, n_running = self.in_turn(), len(self.running())
        if n_running < self.slots:
            n = n_packed(states, self.slots - n_running, budget, self.model_runner.n_cached)
            return states[:n]
        if n_running >= self.max_running:
            return []
        return [state for state in states if self.may_use_spare_slot(state)][:1]


def n_spare_slots(slots: int) -> int:
    """Number of requests that may run beyond the slots."""
    return -(-slots // SLOTS_PER_SPARE)


def n_packed(
    states: Iterable[RequestState], slots: int, budget: int, n_cached: Callable[[RequestState], int] = lambda _: 0
) -> int:
    """Number of the first `slots` requests that one pass reads: one adapter, at most `budget` tokens, but at least one.

    n_cached: tokens of a prompt that are not read; a request that has any is read alone, from the middle of its prompt
    """
    n, total, adapter = 0, 0, None
    for state in islice(states, slots):
        total += len(state.prompt)
        if n > 0 and (state.request.adapter != adapter or total > budget or n_cached(state)):
            break
        n, adapter = n + 1, state.request.adapter
        if n == 1 and n_cached(state):
            break
    return n
