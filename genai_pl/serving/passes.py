"""Passes of the model for vectors and scores: one after the other, and not too many of them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from genai_pl.serving.engine import Engine
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.requests import Busy

T = TypeVar("T")


class Passes:
    """They run beside the engine or, where requests choose adapters of the model, in its thread between two steps."""

    def __init__(self, engine: Engine | None, *, queue_size: int, timeout: float) -> None:
        self.engine, self.queue_size, self.timeout = engine, queue_size, timeout
        self.pool = ThreadPoolExecutor(1, "vectors")
        self.n = 0

    async def run(self, work: Callable[..., T], *arguments: object, adapter: str | None = None) -> T:
        """What the work gives with that adapter; ApiError 429 when too many wait, 504 when it takes too long."""
        if self.n >= self.queue_size:
            raise too_busy(1.0)
        self.n += 1
        try:
            job = asyncio.wrap_future(self._begin(partial(work, *arguments), adapter))
            return await asyncio.wait_for(job, self.timeout)
        except asyncio.TimeoutError:
            raise ApiError(504, f"not finished within {self.timeout:g} seconds") from None
        finally:
            self.n -= 1

    def close(self) -> None:
        """No more of them."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, work: Callable[[], T], adapter: str | None) -> "Future[T]":
        if self.engine is None or not self.engine.adapters.adapters:
            return self.pool.submit(work)
        try:
            return self.engine.between(work, adapter)
        except Busy as busy:
            raise too_busy(busy.retry_after) from None
