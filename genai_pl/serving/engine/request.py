"""Requests to the engine, and the streams of tokens that answer them."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    input_ids: tokens of the prompt; an encoder-decoder reads them with its encoder
    config: sampling settings, stop strings, constraints and max_new_tokens; neither beams nor speculative decoding
    seed: None draws one; with a seed the answer is the same whatever else is in the batch
    adapter: a name among the engine's adapters, None for the base model
    logprobs: n returns log-probabilities of each token and of the n likeliest, None returns none
    deadline: seconds on time.monotonic() after which the answer ends with "deadline"
    client: whose request it is, a key or an address; clients take turns
    group: equal for the answers to one HTTP request, which share its turns and never use a spare slot beside each other
    """

    input_ids: tuple[int, ...]
    config: GenerationConfig
    seed: int | None = None
    adapter: str | None = None
    logprobs: int | None = None
    deadline: float | None = None
    client: str = ""
    group: object = None


class SampledToken(NamedTuple):
    """A token id and, if the request asks for them, log-probabilities in nats.

    logprob: of the token under the model's own distribution, before temperature, top_p and penalties; None if not asked for
    top: the likeliest tokens with their log-probabilities, the likeliest first
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenOutput:
    """One token of an answer; `token`, `logprob` and `top` are those of SampledToken.

    text: characters that this token completes. It is empty while a character has only some of its bytes, or while the text
    may be the beginning of a stop string; the texts of all outputs joined are the answer.
    """

    text: str
    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def check_request(request: Request, *, max_length: int, vocab_size: int, adapters: Collection[str]) -> None:
    """Raise ConfigError for a request that no engine with this context, vocabulary and adapters can answer."""
    ids, config = request.input_ids, request.config
    if not ids:
        raise ConfigError("the prompt is empty: give at least one token")
    if len(ids) > max_length:
        raise ConfigError(f"the prompt has {len(ids)} tokens, the model reads at most {max_length}: shorten the prompt")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ConfigError(f"the prompt has tokens that are not among the model's {vocab_size}")
    if request.adapter is not None and request.adapter not in adapters:
        raise ConfigError(f"adapter={request.adapter} is not loaded; there is: {', '.join(adapters) or 'none'}")
    if config.num_beams > 1 or config.speculates:
        raise ConfigError("serving draws one token at a time: no num_beams, draft or prompt_lookup in generation")


class QueueFull(Exception):
    """Refusal of a request because too many wait or the engine stops; `retry_after` is in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests wait: try again in {retry_after:.1f} seconds")
        self.retry_after = retry_after


@dataclass
class RequestTimes:
    """When things happened to a request, in Unix nanoseconds; None for what has not.

    queued: submission. started: it got a slot. first_token, ended: of its answer
    """

    queued: int = field(default_factory=time.time_ns)
    started: int | None = None
    first_token: int | None = None
    ended: int | None = None


class TokenStream:
    """The outputs of one answer as they are generated: iterate with `for` in a thread or `async for` in an event loop.

    on_cancel: called by `cancel`, from the thread of the caller

    There is one reader. The engine calls `put` and `close` from its own thread; outputs wait in the stream without a bound
    but max_new_tokens, so a slow reader never holds up the batch.

    Attributes: `n_generated` tokens so far, `n_cached` tokens of the prompt that the prefix cache had, `is_cancelled`, `times`,
    `last_reason` once the answer has ended, and `finish_reason` once all outputs are read.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self.n_generated = self.n_cached = 0
        self.is_cancelled = False
        self.times = RequestTimes()
        self.last_reason: str | None = None
        self._on_cancel = on_cancel
        self._outputs: deque[TokenOutput] = deque()
        self._changed = threading.Condition()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def finish_reason(self) -> str | None:
        """stop, length, deadline, cancelled, busy or error; None as long as the reader has outputs to come.

        "stop" is an end token or a stop string, "length" max_new_tokens or the context, "busy" eviction from a full queue.
        """
        with self._changed:
            return None if self._outputs else self.last_reason

    def cancel(self) -> None:
        """Stop the answer: a waiting request leaves the queue at once, a running one its slot after the current step."""
        self.is_cancelled = True
        self._on_cancel()

    def put(self, output: TokenOutput) -> None:
        """Add an output and wake the reader."""
        with self._changed:
            self._outputs.append(output)
            self.n_generated += 1
            self.times.first_token = self.times.first_token or time.time_ns()
            self._wake()

    def close(self, finish_reason: str) -> None:
        """End the stream; the first finish reason counts, later calls change nothing."""
        with self._changed:
            self.last_reason = self.last_reason or finish_reason
            self.times.ended = self.times.ended or time.time_ns()
            self._wake()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenOutput:
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or self.last_reason)
            if not self._outputs:
                raise StopIteration
            return self._outputs.popleft()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        loop = asyncio.get_running_loop()
        while True:
            with self._changed:
                if self._outputs:
                    return self._outputs.popleft()
                if self.last_reason:
                    raise StopAsyncIteration
                waiting = loop.create_future()
                self._reader = (loop, waiting)
            await waiting

    def _wake(self) -> None:
        # `for` waits on the condition, `async for` on a future of its loop, which only that loop's thread may resolve
        self._changed.notify_all()
        if self._reader is not None:
            (loop, waiting), self._reader = self._reader, None
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(_resolve, waiting)


def _resolve(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)


class EngineObserver:
    """Events of the engine, for metrics; every method does nothing unless a subclass overrides it.

    All events but `queued` come from the engine's thread, between two passes: a slow observer slows every answer.
    """

    def queued(self) -> None:
        """A request was queued; called from the thread that submits it."""

    def started(self, waited_s: float) -> None:
        """A request got a slot after this many seconds in the queue."""

    def prefix_lookup(self, n_cached: int, n_bytes: int) -> None:
        """A prompt was read but for its first n_cached tokens, which the prefix cache had; it holds n_bytes."""

    def first_token(self, seconds: float) -> None:
        """A request got its first token, this long after its submission (time to first token)."""

    def token(self, seconds_since_last: float) -> None:
        """A request got another token (inter-token latency)."""

    def finished(self, reason: str, n_prompt: int, n_generated: int) -> None:
        """A request ended with this finish reason, with or without having had a slot."""

    def step(self, batch_size: int) -> None:
        """A decode step gave this many requests a token."""

    def adapters_changed(self, n_served: int, n_leaving: int) -> None:
        """So many adapters are loaded: those that requests may name, and those that only running ones use; from any thread."""
