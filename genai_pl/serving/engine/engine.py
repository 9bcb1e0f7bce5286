"""Batching engine: continuous batching (Yu et al. 2022), where requests join and leave the batch between two decode steps."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.generation import build_output_constraints
from genai_pl.generation.prefix_cache import PrefixBlocks
from genai_pl.models import Model, WrappedDecoder
from genai_pl.serving.engine.adapter_selector import AdapterSelector
from genai_pl.serving.engine.idle_memory import wait_for_work
from genai_pl.serving.engine.model_runner import make_model_runner, prefix_root
from genai_pl.serving.engine.request import EngineObserver, QueueFull, Request, TokenStream, check_request
from genai_pl.serving.engine.request_state import RequestState, isolate_failure
from genai_pl.serving.engine.sampler import sample
from genai_pl.serving.engine.scheduler import Scheduler, n_spare_slots
from genai_pl.serving.engine.thread_queue import ThreadQueue
from genai_pl.serving.fair_queue import Full

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("genai_pl.serving")
DECODE_SHARE = 0.5  # seconds of decode steps that must follow each second of prefill and of the thread queue's work
SMOOTHING = 0.1  # weight of the newest request in the mean duration of requests


class Engine:
    """Answers requests with one model, up to `slots` at once, in a thread of its own.

    model: weights on the device where passes run; it is set to eval mode, and adapters are loaded into it
    tokenizer: copied, as tokenizers change state while they work and the caller's threads use theirs
    slots: requests that run at once; a quarter as many again may run in spare slots (see Scheduler)
    max_length: tokens of prompt and answer together, at most the model's max_seq_len, which is the default
    queue_size: requests that wait at most; more raise QueueFull
    prefill_chunk: prompt tokens that are read between two decode steps
    prefix_cache_mib: MiB of keys and values kept for prompts that begin like earlier requests; 0 keeps none
    adapters: adapter folder by the name that requests use
    reloads_adapters: adapters may be loaded and retired while requests run; scores then always wait for a turn between two steps
    observer: receives the events that Prometheus counts

    Only the engine's thread changes requests that run, so nothing in a pass needs a lock. Other threads meet it at `submit`,
    at the TokenStream of each answer and at `run_between_steps`; the lock guards the queue and the stop flag, never a pass.

        engine = Engine(model, tokenizer)
        engine.start()
        for output in engine.submit(Request(input_ids, GenerationConfig(max_new_tokens=20))):
            print(output.text, end="")
        engine.stop()
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
        prefix_cache_mib: float = 64.0,
        adapters: Mapping[str, str] | None = None,
        reloads_adapters: bool = False,
        observer: EngineObserver | None = None,
    ) -> None:
        for name, value in {"slots": slots, "queue_size": queue_size, "prefill_chunk": prefill_chunk}.items():
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        self.model = model.eval()
        self.tokenizer = deepcopy(tokenizer)
        self.slots, self.queue_size = slots, queue_size
        self.max_length = min(max_length or model.config.max_seq_len, model.config.max_seq_len)
        self.observer = observer or EngineObserver()
        self.adapters = AdapterSelector(model, adapters or {}, is_fixed=not reloads_adapters, observer=self.observer)
        self.device = self.adapters.device
        self._changed = threading.Condition()  # the lock, and the signal that there is something to do
        n_rows = slots + n_spare_slots(slots)
        if prefix_cache_mib < 0:
            raise ConfigError(f"prefix_cache_mib={prefix_cache_mib} must be at least 0 (0: no prefix cache)")
        blocks = PrefixBlocks(prefix_cache_mib * 2**20) if prefix_cache_mib else None
        options = {"slots": n_rows, "max_length": self.max_length, "prefix_blocks": blocks}
        self.model_runner = make_model_runner(model, self.adapters, **options)
        self.scheduler = Scheduler(
            self.model_runner,
            slots=slots,
            queue_size=queue_size,
            lock=self._changed,
            start=self._start_request,
            finish=self.finish,
        )
        self.prefill_budget = self.max_length if self.model_runner.prefills_whole_prompts else prefill_chunk
        self.thread_queue = ThreadQueue()
        self.decode_seconds_owed = 0.0  # of decode steps, before the next prefill
        self.mean_seconds = 1.0  # that a request takes from submission to its end
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    # one step

    def step(self) -> None:
        """One decode step for all running requests, before it a prefill pass if it is due.

        Prefill is due when decoding has had its share of the time since the last one. So answers that grow keep a third of
        the engine's time, however many requests come, and leave, and come again.
        """
        self._finish_stopped()
        self._unload_adapters()
        # schedule and prefill, with one callable of another thread
        if self.decode_seconds_owed <= 0 or not self.model_runner.states:
            start = time.monotonic()
            if self.thread_queue:
                self.thread_queue.run_next()
            self.prefill()
            self.decode_seconds_owed = DECODE_SHARE * (time.monotonic() - start)
        # decode
        if self.model_runner.states:
            start = time.monotonic()
            self.decode()
            self.decode_seconds_owed -= time.monotonic() - start

    def prefill(self) -> None:
        """Read prompts, at most `prefill_budget` tokens; each prompt that is complete gets its first token and decodes on."""
        budget = self.prefill_budget
        while budget > 0 and (states := list(self.scheduler.schedule(budget))):
            try:
                logits, n_tokens = self.model_runner.prefill(states, budget)
                budget -= n_tokens
                if logits is None:
                    self.scheduler.pause()
                else:
                    self.append_tokens(logits, states)
                    self.scheduler.start_decoding()
                    self._report_prefixes(states)
            except Exception:
                log.exception("a prompt cannot be read: its answer ends")
                self.scheduler.fail_prefill()

    def decode(self) -> None:
        """One more token for every request in the batch; requests that end with it leave the batch."""
        states = list(self.model_runner.states)
        logits = self.model_runner.decode()
        self.append_tokens(logits, states)
        self.observer.step(len(states))
        self._remove_finished()

    def append_tokens(self, logits: Tensor, states: list[RequestState]) -> None:
        """Sample a token for each request from its row of the logits (B, V), and hand it to the request's stream.

        A request whose token fails gets finish_reason "error"; one that has a finish_reason gets no token.
        """
        for state, token in zip(states, sample(logits, states), strict=True):
            if token is not None:
                with isolate_failure(state):
                    state.append_token(token, max_length=self.max_length)
                    state.report_latency(self.observer)

    def _report_prefixes(self, states: list[RequestState]) -> None:
        if (blocks := self.model_runner.prefix_blocks) is not None:
            for state in states:
                self.observer.prefix_lookup(state.stream.n_cached, blocks.n_bytes)

    def finish(self, state: RequestState, finish_reason: str | None = None) -> None:
        """End a request that has left queue and batch, for this reason or for the one that it has."""
        state.finish_reason = finish_reason or state.finish_reason
        self.mean_seconds += SMOOTHING * (time.monotonic() - state.submit_time - self.mean_seconds)
        with self._changed:  # the client paid for max_new_tokens when the request left the queue
            # nor was a cached part of the prompt read
            self.scheduler.waiting.refund(state.request.client, state.n_remaining + state.stream.n_cached)
        state.finish(self.observer)

    def _start_request(self, state: RequestState) -> None:
        self.observer.started(time.monotonic() - state.submit_time)
        state.stream.times.started = time.time_ns()
        with isolate_failure(state):
            state.start(self.model, self.tokenizer, self.device)

    def _finish_stopped(self) -> None:
        """Finish requests that are cancelled or past their deadline, wherever they are."""
        now = time.monotonic()
        for state in self.scheduler.remove_stopped(now):
            self.finish(state)
        for state in self.model_runner.states:
            state.check_stopped(now)
        self._remove_finished()

    def _unload_adapters(self) -> None:
        """Take leaving adapters that nothing uses out of the model, and what was kept of texts that were read with them."""
        with self._changed:
            unused = self._unused_adapters()
        for name in unused:
            adapter = self.adapters.unload(name)
            if (blocks := self.model_runner.prefix_blocks) is not None:
                blocks.forget(prefix_root(adapter))

    def _unused_adapters(self) -> list[str]:
        if not self.adapters.leaving:
            return []
        states = [*self.scheduler.waiting, *self.scheduler.running()]
        return self.adapters.unused({state.request.adapter for state in states})

    def _remove_finished(self) -> None:
        for n in reversed(range(len(self.model_runner.states))):  # removing n moves only rows above n
            if self.model_runner.states[n].finish_reason:
                self.finish(self.model_runner.remove_request(n))

    # the thread

    def start(self) -> None:
        """Start the thread; requests that were submitted before are answered, too."""
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float = 30) -> None:
        """Refuse new requests, finish the others and end the thread.

        Without `drain`, or after `timeout` seconds of it, answers are cancelled after the step that runs.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is not None and drain:
            self._thread.join(timeout)
        self.cancel_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._finish_stopped()  # what was submitted while no thread ran
        self.thread_queue.cancel()

    def cancel_all(self) -> None:
        """Cancel all requests; they end after the step that runs."""
        with self._changed:
            for state in [*self.scheduler.waiting, *self.scheduler.running()]:
                state.stream.is_cancelled = True
            self._changed.notify_all()

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                wait_for_work(self._changed, lambda: self._is_busy() or self._is_stopping, self.model_runner.release)
                if not self._is_busy():
                    return
                try:
                    self.step()
                except Exception:  # of the model: which request is to blame is unknown
                    log.exception("a step failed: the answers in it end")
                    for state in self.model_runner.clear():
                        self.finish(state, "error")

    def _is_busy(self) -> bool:
        return bool(self.scheduler.waiting or self.n_running or self.thread_queue or self._unused_adapters())

    # other threads

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return len(self.scheduler.waiting)

    @property
    def n_running(self) -> int:
        """Requests with a slot."""
        return len(self.scheduler.running())

    def submit(self, request: Request) -> TokenStream:
        """The stream of the answer, which starts once a slot is free.

        Raises QueueFull if too many requests wait or the engine stops, ConfigError for a request that no slot can answer.
        """
        vocab_size, adapters = self.model.config.vocab_size, self.adapters.adapters
        check_request(request, max_length=self.max_length, vocab_size=vocab_size, adapters=adapters)
        # refuse before compiling a grammar, which may take seconds
        with self._changed:
            if self._is_stopping or not self.scheduler.waiting.accepts(request.client):
                raise QueueFull(self._retry_after())
        end_tokens = self.adapters.end_tokens(request.adapter)
        constraints = build_output_constraints(self.tokenizer, request.config, end_tokens)
        stream = TokenStream(lambda: self._cancel_waiting(state))
        state = RequestState(request, stream, constraints=constraints, model=self.model, tokenizer=self.tokenizer)
        # enqueue; a full queue evicts the newest request of the client that has most in it
        with self._changed:
            if self._is_stopping:
                raise QueueFull(self._retry_after())
            try:
                evicted = self.scheduler.waiting.add(request.client, state)
            except Full:
                raise QueueFull(self._retry_after()) from None
            self._changed.notify_all()
        if evicted is not None:
            self.finish(evicted, "busy")
        self.observer.queued()
        return state.stream

    def run_between_steps(self, work: Callable[[], object], adapter: str | None = None) -> Future:
        """Future of work that the engine's thread does between two steps, with this adapter selected; QueueFull once it stops."""

        def run() -> object:
            with self.adapters.selected([adapter]):
                return work()

        with self._changed:
            if self._is_stopping:
                raise QueueFull(self._retry_after())
            self._changed.notify_all()
            return self.thread_queue.add(run)

    def load_adapter(self, name: str, folder: str) -> Future:
        """Future of an adapter that requests may name from then on; its exception says why it cannot be loaded."""
        return self.run_between_steps(lambda: self.adapters.load(name, Path(folder)))

    def use_adapter(self, name: str, n: int) -> None:
        """Note that n more users of an adapter begin, or that -n of them end."""
        with self._changed:
            self.adapters.n_users[name] += n
            self._changed.notify_all()

    def retire_adapter(self, name: str) -> None:
        """Unload an adapter once no request and no user needs it; the caller lets nobody name it any more."""
        with self._changed:
            self.adapters.retire(name)
            self._changed.notify_all()

    def _cancel_waiting(self, state: RequestState) -> None:
        """Free the queue place of a cancelled request at once; one that runs ends after the current step."""
        with self._changed:
            waited = self.scheduler.waiting.remove(state.request.client, state)
            self._changed.notify_all()
        if waited:
            self.finish(state, "cancelled")

    def _retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free: one request's duration over the slots."""
        return max(1.0, self.mean_seconds / self.slots)
