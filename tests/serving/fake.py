"""Fake engine: the answers are texts of the test, one for each token."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from genai_pl.serving.engine.request import QueueFull, Request, TokenOutput
from tests.serving.servers import make_service, serving


class FakeStream:
    """Yields the texts, then ends with `finish_reason`; with None it waits until it is cancelled or released."""

    def __init__(self, texts: list[str], finish_reason: str | None) -> None:
        self.texts, self.last_reason = texts, finish_reason
        self.finish_reason: str | None = None
        self.n_generated = self.n_cached = 0
        self.cancelled = threading.Event()
        self.released = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[TokenOutput]:
        for text in self.texts:
            self.n_generated += 1
            yield TokenOutput(text, 65, None, ())
        while self.last_reason is None and not self.cancelled.is_set() and not self.released.is_set():
            await asyncio.sleep(0.002)
        if self.released.is_set():
            self.n_generated += 1
            yield TokenOutput("!", 33, None, ())
        self.finish_reason = self.last_reason or ("stop" if self.released.is_set() else "cancelled")


class FakeEngine:
    """Answers every request with the same stream; beyond `capacity` requests it raises QueueFull."""

    def __init__(self, texts: list[str], finish_reason: str | None = "stop", *, capacity: int = 100) -> None:
        self.make: Callable[[], FakeStream] = lambda: FakeStream(texts, finish_reason)
        self.capacity = capacity
        self.requests: list[Request] = []
        self.streams: list[FakeStream] = []
        self.n_waiting = 0

    @property
    def n_running(self) -> int:
        return len([s for s in self.streams if s.finish_reason is None and not s.cancelled.is_set()])

    def start(self) -> None:
        """Do nothing."""

    def stop(self, drain: bool = True, timeout: float = 30) -> None:
        """Do nothing."""

    def submit(self, request: Request) -> FakeStream:
        if len(self.streams) >= self.capacity:
            raise QueueFull(2.5)
        self.requests.append(request)
        self.streams.append(self.make())
        return self.streams[-1]


@contextmanager
def playing(
    folder: Path, connect: Callable[[str], AbstractContextManager]
) -> Iterator[Callable[..., tuple[Any, FakeEngine]]]:
    """Context with a function from texts to (client, engine): a server of the model generates the texts.

    connect: a client of the server at a URL
    """
    with ExitStack() as stack:

        def start(texts: list[str], reason: str = "stop") -> tuple[Any, FakeEngine]:
            service = make_service(folder, cache=None)
            service.engine = FakeEngine(texts, reason)
            client = stack.enter_context(serving(service))
            return stack.enter_context(connect(str(client.base_url))), service.engine

        yield start
