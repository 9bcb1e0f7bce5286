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
from genai_pl.serving.engine.model_runner import Adapters, make_batch
from genai_pl.serving.engine.request import Busy, Observer, Request, Stream, check_request
from genai_pl.serving.engine.request_state import Row, ending_alone
from genai_pl.serving.engine.sampler import choose
from genai_pl.serving.engine.scheduler import read_prompts, spare_places
from genai_pl.serving.fair_queue import FairQueue, Full


class Jobs:
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
        observer: Observer | None = None,
    ) -> None:
        for name, value in {"slots": slots, "queue_size": queue_size, "prefill_chunk": prefill_chunk}.items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        self.model = model.eval()
        self.tokenizer = deepcopy(tokenizer)  # for another thread: tokenizers change state while they work
        self.slots, self.queue_size = slots, queue_size
        self.max_length = min(max_length or model.config.max_seq_len, model.config.max_seq_len)
        self.observer = observer or Observer()
        self.adapters = Adapters(model, adapters or {})
        self.device = self.adapters.device
        self.places = slots + spare_places(slots)
        self.batch = make_batch(model, self.adapters, self.places)
        self.chunk = self.max_length if self.batch.whole_prompts else prefill_chunk
        self.waiting: FairQueue[Row] = FairQueue(queue_size, lambda row: row.n_tokens)
        self.jobs = Jobs()
        self.reading: list[Row] = []  # one whose prompt is read, or some that are read whole in one pass
        self.resting: deque[Row] = deque()  # those whose prompts are read in part, the next one first
        self.is_newcomers_turn = True  # else of those that rest
        self.owed, self.seconds = 0.0, 1.0  # that steps have before the next chunk; that a request takes on average
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
        self._sweep()
        self.jobs.cancel()

    def between(self, work: Callable[[], object], adapter: str | None = None) -> Future:
        """What the work will give, done with that adapter in the thread that owns the model, between two steps."""

        def done() -> object:
            self.adapters.choose([adapter])
            return work()

        with self._changed:
            if self._is_stopping:
                raise Busy(self._wait())
            self._changed.notify_all()
            return self.jobs.add(done)

    def submit(self, request: Request) -> Stream:
        """The answer, which begins as soon as a slot is free; Busy if too many wait, ConfigError for what cannot work."""
        vocab_size, adapters = self.model.config.vocab_size, self.adapters.adapters
        check_request(request, max_length=self.max_length, vocab_size=vocab_size, adapters=adapters)
        with self._changed:
            if self._is_stopping or not self.waiting.admits(request.client):  # before any work
                raise Busy(self._wait())
        constraints = build_output_constraints(self.tokenizer, request.config, self.adapters.ends(request.adapter))
        stream = Stream(lambda: self._forget(row))
        row = Row(request, stream, constraints=constraints, model=self.model, tokenizer=self.tokenizer)
        with self._changed:
            if self._is_stopping:
                raise Busy(self._wait())
            try:
                pushed = self.waiting.add(request.client, row)
            except Full:
                raise Busy(self._wait()) from None
            self._changed.notify_all()
        if pushed is not None:
            self.end(pushed, "busy")
        self.observer.queued()
        return row.stream

    def _forget(self, row: Row) -> None:
        """Whoever asked has left: the place of a row that waits is free at once."""
        with self._changed:
            waited = self.waiting.remove(row.request.client, row)
            self._changed.notify_all()
        if waited:
            self.end(row, "cancelled")

    def _wait(self) -> float:
        """Seconds until a place in the queue is likely to be free."""
        return max(1.0, self.seconds / self.slots)

    def next_rows(self, choose: Callable[[], list[Row]]) -> list[Row]:
        """Those that are chosen among the ones that wait; they wait no longer."""
        with self._changed:
            rows = choose()
            for row in rows:
                self.waiting.take(row.request.client, row)
            return rows

    def running(self) -> list[Row]:
        """Those that have a slot."""
        return [*self.batch.rows, *self.reading, *self.resting]

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_busy() or self._is_stopping)
                if not self._is_busy():
                    return
                try:
                    self._turn()
                except Exception:
                    log.exception("a step failed: the answers in it end")
                    for row in self.batch.clear():
                        self.end(row, "error")

    def _is_busy(self) -> bool:
        return bool(self.waiting or self.n_running or self.jobs)

    def _turn(self) -> None:
        """End what is over, do a job of others, read a chunk of prompts, and give every row its next token.

        However many come, and leave again, those that are being answered have their share of the time.
        """
        self._sweep()
        if self.owed <= 0 or not self.batch.rows:
            began = time.monotonic()
            if self.jobs:
                self.jobs.do_next()
            read_prompts(self)
            self.owed = STEPS_SHARE * (time.monotonic() - began)
        if self.batch.rows:
            began = time.monotonic()
            self._step()
            self.owed -= time.monotonic() - began

    def _sweep(self) -> None:
        """End the answers that are over, or that nobody waits for."""
        now = time.monotonic()
        with self._changed:
            for row in self.waiting:
                row.check(now)
            over = [r for r in list(self.waiting) if r.ending and self.waiting.remove(r.request.client, r)]
        for row in over:
            self.end(row)
        for row in list(self.resting):
            row.check(now)
            if row.ending:
                self.resting.remove(row)
                self.end(row)
        for row in self.batch.rows:
            row.check(now)
        self._leave()

    def _step(self) -> None:
        """One more token for every row."""
        rows = list(self.batch.rows)
        self.take(self.batch.read(), rows)
        self.observer.step(len(rows))
        self._leave()

    def take(self, logits: torch.Tensor, rows: list[Row]) -> None:
        """Give each row its next token by the logits (B, V), unless it is over."""
        for row, chosen in zip(rows, choose(logits, rows), strict=True):
            if chosen is not None:
                with ending_alone(row):
                    row.take(*chosen, max_length=self.max_length)
                    row.tell(self.observer)

    def _leave(self) -> None:
        for n in reversed(range(len(self.batch.rows))):
            if self.batch.rows[n].ending:
                self.end(self.batch.leave(n))

    def end(self, row: Row, reason: str | None = None) -> None:
        """Let a row go, for a reason or for the one that it has."""
        row.ending = reason or row.ending
        self.seconds += 0.1 * (time.monotonic() - row.submitted - self.seconds)
        with self._changed:
            self.waiting.give_back(row.request.client, row.n_unwritten)
        row.end(self.observer)

    def cancel_all(self) -> None:
        """Let all answers end after the step that runs."""
        with self._changed:
            for row in [*self.waiting, *self.running()]:
                row.stream.is_cancelled = True
            self._changed.notify_all()
