"""Passes of the model for vectors and scores, cut into slices between which other requests have their turn."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import QueueFull
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.fair_queue import FairLock

T = TypeVar("T")
Slices = Generator[None, None, T]  # each step is a slice of the work, which in the end returns its result


class ScoringQueue:
    """They run beside the engine or, where requests choose adapters of the model, in its thread between two steps.

    At most `queue_size` of them wait for a first slice. One that nobody waits for any more ends with its slice.
    """

    def __init__(self, engine: Engine | None, *, queue_size: int, timeout: float) -> None:
        self.engine, self.timeout = engine, timeout
        self.pool = ThreadPoolExecutor(1, "vectors")
        self.lock = FairLock(queue_size)
        self.is_stopped = False

    async def run(self, slices: Slices[T], *, adapter: str | None = None) -> T:
        """What the slices return with that adapter; ApiError 429 when too many wait, 504 when it takes too long."""
        try:
            return await asyncio.wait_for(self._run(slices, adapter), self.timeout)
        except asyncio.TimeoutError:
            raise ApiError(504, f"not finished within {self.timeout:g} seconds") from None

    def stop(self) -> None:
        """End those that run with their slice."""
        self.is_stopped = True

    def close(self) -> None:
        """No more of them."""
        self.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, slices: Slices[T], adapter: str | None) -> T:
        has_begun = False
        while True:
            async with self.lock.acquire(force=has_begun):
                if self.is_stopped:
                    raise ApiError(503, "the server is stopping", headers={"Retry-After": "5"})
                is_over, result = await asyncio.wrap_future(self._begin(partial(_advance, slices), adapter))
            if is_over:
                return result
            has_begun = True

    def _begin(self, work: Callable[[], T], adapter: str | None) -> "Future[T]":
        if self.engine is None or not self.engine.adapters.adapters:
            return self.pool.submit(work)
        try:
            return self.engine.run_between_steps(work, adapter)
        except QueueFull as busy:
            raise too_busy(busy.retry_after) from None


def _advance(slices: Slices[T]) -> tuple[bool, T | None]:
    """Whether the work is over, and its result; exceptions that are StopIteration cannot leave a thread."""
    try:
        next(slices)
    except StopIteration as over:
        return True, over.value
    return False, None
