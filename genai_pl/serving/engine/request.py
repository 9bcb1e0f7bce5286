"""What is asked of the engine, and what comes back, token by token."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, Self

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued."""

    input_ids: tuple[int, ...]
    config: GenerationConfig
    seed: int | None = None  # None: drawn; the same seed gives the same text whatever else is in the batch
    adapter: str | None = None  # a name that the engine knows; None: the model without any of them
    logprobs: int | None = None  # None: none; n: of the chosen token and of the n likeliest
    deadline: float | None = None  # on time.monotonic(): later it ends with "deadline"
    client: str = ""  # who asks: clients take turns
    group: object = None  # the same for requests that are answers to one question: they never have all slots


class SampledToken(NamedTuple):
    """A token and, if the request asks for them, log-probabilities."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenOutput:
    """One token and the text that it set free, which may be none."""

    text: str
    token: int
    logprob: float | None  # the model's own, before temperature and the like
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, the likeliest first


def check_request(request: Request, *, max_length: int, vocab_size: int, adapters: Collection[str]) -> None:
    """ConfigError for what no engine of this context, vocabulary and these adapters can answer."""
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
    """No more requests can wait; one may try again after so many seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"too many requests wait: try again in {retry_after:.1f} seconds")
        self.retry_after = retry_after


class TokenStream:
    """The pieces of one answer as they come: `for` in a thread, `async for` in any event loop; one reader.

    The engine calls `put` and `close` from its own thread.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self.n_generated = 0
        self.is_cancelled = False
        self._on_cancel = on_cancel
        self._outputs: deque[TokenOutput] = deque()
        self._finish_reason: str | None = None
        self._changed = threading.Condition()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def finish_reason(self) -> str | None:
        """Why there are no more: stop, length, deadline, cancelled, busy or error; None before all pieces are taken."""
        with self._changed:
            return None if self._outputs else self._finish_reason

    def cancel(self) -> None:
        """Ask for no more; the slot is free after the engine's current step."""
        self.is_cancelled = True
        self._on_cancel()

    def put(self, output: TokenOutput) -> None:
        """Hand a piece to the reader."""
        with self._changed:
            self._outputs.append(output)
            self.n_generated += 1
            self._wake()

    def close(self, finish_reason: str) -> None:
        """Say why there is no more; only the first reason counts."""
        with self._changed:
            self._finish_reason = self._finish_reason or finish_reason
            self._wake()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenOutput:
        with self._changed:
            self._changed.wait_for(lambda: self._outputs or self._finish_reason)
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
                if self._finish_reason:
                    raise StopAsyncIteration
                waiting = loop.create_future()
                self._reader = (loop, waiting)
            await waiting

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._reader is not None:
            (loop, waiting), self._reader = self._reader, None
            with suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(_resolve, waiting)


def _resolve(waiting: "asyncio.Future[None]") -> None:
    if not waiting.done():
        waiting.set_result(None)


class EngineObserver:
    """Told what happens to requests, from the engine's thread; everything is ignored unless a subclass says otherwise."""

    def queued(self) -> None:
        """A request waits, told from the thread that submits it."""

    def started(self, waited_s: float) -> None:
        """It has a slot."""

    def first_token(self, seconds: float) -> None:
        """It has its first token, that long after it was submitted."""

    def token(self, seconds_since_last: float) -> None:
        """It has another one."""

    def finished(self, reason: str, n_prompt: int, n_generated: int) -> None:
        """It is over."""

    def step(self, batch_size: int) -> None:
        """So many rows get their next token."""
