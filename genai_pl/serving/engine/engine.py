"""Continuous batching (Yu et al. 2022): one thread owns the model, and requests join and leave between two of its steps."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from genai_pl.errors import ConfigError
from genai_pl.generation import build_output_constraints
from genai_pl.models import Model, WrappedDecoder
from genai_pl.serving.engine.model_runner import AdapterSelector, make_model_runner
from genai_pl.serving.engine.request import EngineObserver, QueueFull, Request, TokenStream, check_request
from genai_pl.serving.engine.request_state import RequestState, isolate_failure
from genai_pl.serving.engine.sampler import sample
from genai_pl.serving.engine.scheduler import n_spare_slots, prefill
from genai_pl.serving.fair_queue import FairQueue, Full


class ThreadQueue:
    """What waits to be done, the oldest first; whoever handed it in gets what it gives or raises."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future, Callable[[], object]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, work: Callable[[], object]) -> Future:
        """What will come of it."""
        future: Future = Future()
        self._waiting.append((future, work))
        return future

    def do_next(self) -> None:
        """Do the oldest, if somebody still waits for it."""
        future, work = self._waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    def cancel(self) -> None:
        """Do none of them."""
        while self._waiting:
            self._waiting.popleft()[0].cancel()


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("genai_pl.serving")
STEPS_SHARE = 0.5  # of the time that prompts and jobs take, which steps of the answers then have first


class Engine:
    """Answers requests, up to `slots` of them at once, while up to `queue_size` wait.

    Clients take turns, by tokens; one for which nothing runs has a spare place when all slots are taken, as has what is
    over before one is free. Prompts are read in chunks of at most `prefill_chunk` tokens, one between two steps; those
    that wait have every second one. max_length bounds prompt and answer; `adapters` are folders by the names of requests.
    """

    def __init__(
        self,
        model: Model | WrappedDecoder,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        slots: int = 8,
        max_length: int | None = None,
        queue_size: int = 64,
        prefill_chunk: int = 512,
        adapters: Mapping[str, str] | None = None,
        observer: EngineObserver | None = None,
    ) -> None:
        for name, value in {"slots": slots, "queue_size": queue_size, "prefill_chunk": prefill_chunk}.items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        self.model = model.eval()
        self.tokenizer = deepcopy(tokenizer)  # for another thread: tokenizers change state while they work
        self.slots, self.queue_size = slots, queue_size
        self.max_length = min(max_length or model.config.max_seq_len, model.config.max_seq_len)
        self.observer = observer or EngineObserver()
        self.adapters = AdapterSelector(model, adapters or {})
        self.device = self.adapters.device
        self.max_running = slots + n_spare_slots(slots)
        self.model_runner = make_model_runner(model, self.adapters, self.max_running)
        self.chunk_tokens = self.max_length if self.model_runner.prefills_whole_prompts else prefill_chunk
        self.waiting: FairQueue[RequestState] = FairQueue(queue_size, lambda state: state.n_tokens)
        self.thread_queue = ThreadQueue()
        self.prefilling: list[RequestState] = []  # one whose prompt is read, or some that are read whole in one pass
        self.paused: deque[RequestState] = deque()  # those whose prompts are read in part, the next one first
        self.new_requests_first = True  # else of those that rest
        self.decode_seconds_owed, self.mean_seconds = (
            0.0,
            1.0,
        )  # that steps have before the next chunk; that a request takes on average
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return len(self.waiting)

    @property
    def n_running(self) -> int:
        """Requests with one."""
        return len(self.running())

    def start(self) -> None:
        """Begin to answer what is submitted, or was."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Take no more requests, finish those that are there (not without `drain`, nor after `timeout`), and end."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is not None and drain:
            self._thread.join(timeout)
        self.cancel_all()
        if self._thread is not None:
            self._thread.join()  # the step that it is in
            self._thread = None
        self._finish_stopped()
        self.thread_queue.cancel()

    def run_between_steps(self, work: Callable[[], object], adapter: str | None = None) -> Future:
        """What the work will give, done with that adapter in the thread that owns the model, between two steps."""

        def run() -> object:
            self.adapters.activate([adapter])
            return work()

        with self._changed:
            if self._is_stopping:
                raise QueueFull(self._retry_after())
            self._changed.notify_all()
            return self.thread_queue.add(run)

    def submit(self, request: Request) -> TokenStream:
        """The answer, which begins as soon as a slot is free; Busy if too many wait, ConfigError for what cannot work."""
        vocab_size, adapters = self.model.config.vocab_size, self.adapters.adapters
        check_request(request, max_length=self.max_length, vocab_size=vocab_size, adapters=adapters)
        with self._changed:
            if self._is_stopping or not self.waiting.accepts(request.client):  # before any work
                raise QueueFull(self._retry_after())
        constraints = build_output_constraints(
            self.tokenizer, request.config, self.adapters.end_tokens(request.adapter)
        )
        stream = TokenStream(lambda: self._cancelled(state))
        state = RequestState(request, stream, constraints=constraints, model=self.model, tokenizer=self.tokenizer)
        with self._changed:
            if self._is_stopping:
                raise QueueFull(self._retry_after())
            try:
                evicted = self.waiting.add(request.client, state)
            except Full:
                raise QueueFull(self._retry_after()) from None
            self._changed.notify_all()
        if evicted is not None:
            self.finish(evicted, "busy")
        self.observer.queued()
        return state.stream

    def _cancelled(self, state: RequestState) -> None:
        """Whoever asked has left: the place of a row that waits is free at once."""
        with self._changed:
            waited = self.waiting.remove(state.request.client, state)
            self._changed.notify_all()
        if waited:
            self.finish(state, "cancelled")

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free."""
        return max(1.0, self.mean_seconds / self.slots)

    def take_waiting(self, select: Callable[[], list[RequestState]]) -> list[RequestState]:
        """Those that are chosen among the ones that wait; they wait no longer."""
        with self._changed:
            states = select()
            for state in states:
                self.waiting.dequeue(state.request.client, state)
            return states

    def running(self) -> list[RequestState]:
        """Those that have a slot."""
        return [*self.model_runner.states, *self.prefilling, *self.paused]

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_busy() or self._is_stopping)
                if not self._is_busy():
                    return
                try:
                    self.step()
                except Exception:
                    log.exception("a step failed: the answers in it end")
                    for state in self.model_runner.clear():
                        self.finish(state, "error")

    def _is_busy(self) -> bool:
        return bool(self.waiting or self.n_running or self.thread_queue)

    def step(self) -> None:
        """End what is over, do a job of others, read a chunk of prompts, and give every row its next token.

        However many come, and leave again, those that are being answered have their share of the time.
        """
        self._finish_stopped()
        if self.decode_seconds_owed <= 0 or not self.model_runner.states:
            began = time.monotonic()
            if self.thread_queue:
                self.thread_queue.do_next()
            prefill(self)
            self.decode_seconds_owed = STEPS_SHARE * (time.monotonic() - began)
        if self.model_runner.states:
            began = time.monotonic()
            self.decode()
            self.decode_seconds_owed -= time.monotonic() - began

    def _finish_stopped(self) -> None:
        """End the answers that are over, or that nobody waits for."""
        now = time.monotonic()
        with self._changed:
            for state in self.waiting:
                state.check_stopped(now)
            over = [r for r in list(self.waiting) if r.finish_reason and self.waiting.remove(r.request.client, r)]
        for state in over:
            self.finish(state)
        for state in list(self.paused):
            state.check_stopped(now)
            if state.finish_reason:
                self.paused.remove(state)
                self.finish(state)
        for state in self.model_runner.states:
            state.check_stopped(now)
        self._remove_finished()

    def decode(self) -> None:
        """One more token for every row."""
        states = list(self.model_runner.states)
        self.append_tokens(self.model_runner.decode(), states)
        self.observer.step(len(states))
        self._remove_finished()

    def append_tokens(self, logits: torch.Tensor, states: list[RequestState]) -> None:
        """Give each row its next token by the logits (B, V), unless it is over."""
        for state, token in zip(states, sample(logits, states), strict=True):
            if token is not None:
                with isolate_failure(state):
                    state.append_token(*token, max_length=self.max_length)
                    state.report_latency(self.observer)

    def _remove_finished(self) -> None:
        for n in reversed(range(len(self.model_runner.states))):
            if self.model_runner.states[n].finish_reason:
                self.finish(self.model_runner.remove_request(n))

    def finish(self, state: RequestState, finish_reason: str | None = None) -> None:
        """Let a row go, for a reason or for the one that it has."""
        state.finish_reason = finish_reason or state.finish_reason
        self.mean_seconds += 0.1 * (time.monotonic() - state.submit_time - self.mean_seconds)
        with self._changed:
            self.waiting.refund(state.request.client, state.n_remaining)
        state.finish(self.observer)

    def cancel_all(self) -> None:
        """Let all answers end after the step that runs."""
        with self._changed:
            for state in [*self.waiting, *self.running()]:
                state.stream.is_cancelled = True
            self._changed.notify_all()
