"""Scoring queue: embedding and scoring requests take turns slice by slice, beside the engine or in its thread."""

import asyncio
import logging
import math
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch

from genai_pl.serving.engine.engine import Engine
from genai_pl.serving.engine.request import QueueFull
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.fair_queue import FairLock

log = logging.getLogger("genai_pl.serving")
T = TypeVar("T")
Slices = Generator[None, None, T]  # of scoring.py: every `yield` ends a slice, the return value is the result


class ScoringQueue:
    """Runs slices of one request at a time, each slice in the turn of its client.

    engine: whose thread runs the slices between two of its steps if it has adapters or may get some, since activating or
    loading one changes the model for everybody; without adapters (or engine) a thread of this queue runs them, at the same
    time as the engine's passes
    queue_size: requests that may wait for their first slice; a request that has had one always gets the next
    timeout: seconds from the first wait to the result

    A request whose client has left is cancelled like any coroutine: the slice that runs is its last.
    """

    def __init__(self, engine: Engine | None, *, queue_size: int, timeout: float) -> None:
        self.engine, self.timeout = engine, timeout
        self.pool = ThreadPoolExecutor(1, "vectors")
        self.lock = FairLock(queue_size)
        self.is_stopped = False

    async def run(self, slices: Slices[T], *, adapter: str | None = None) -> T:
        """The return value of the slices, computed with this adapter.

        Raises ApiError 429 if too many requests wait, 503 once the server stops, 504 after `timeout`.
        """
        try:
            return await asyncio.wait_for(self._run(slices, adapter), self.timeout)
        except asyncio.TimeoutError:
            raise ApiError(504, f"not finished within {self.timeout:g} seconds") from None

    def stop(self) -> None:
        """Refuse further slices; the one that runs ends by itself."""
        self.is_stopped = True

    def close(self) -> None:
        """Stop, and end the thread after its slice."""
        self.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, slices: Slices[T], adapter: str | None) -> T:
        has_begun = False
        while True:
            # one slice for each turn, so that a request of a thousand slices waits after each for the requests of others
            async with self.lock.acquire(force=has_begun):
                if self.is_stopped:
                    raise ApiError(503, "the server is stopping", headers={"Retry-After": "5"})
                is_over, result = await asyncio.wrap_future(self._begin(partial(_advance, slices), adapter))
            if is_over:
                return result
            has_begun = True

    def _begin(self, work: Callable[[], T], adapter: str | None) -> "Future[T]":
        if self.engine is None or (self.engine.adapters.is_fixed and not self.engine.adapters.adapters):
            return self.pool.submit(work)
        try:
            return self.engine.run_between_steps(work, adapter)
        except QueueFull as busy:
            raise too_busy(busy.retry_after) from None


def _advance(slices: Slices[T]) -> tuple[bool, T | None]:
    """(is finished, result) after one more slice; ApiError 500 for a result with a number that is not finite.

    JSON has no such number, and in base64 a client would take it for a vector.

    A Future cannot carry StopIteration, which would end the generator that awaits it: the result comes as a value.
    """
    try:
        next(slices)
    except StopIteration as over:
        result = over.value
    else:
        return False, None
    if not _is_finite(result):
        log.error("the model's values for a request are not finite: it gets none")
        raise ApiError(500, "the model failed; the log has the reason")
    return True, result


def _is_finite(result: object) -> bool:
    """True unless a tensor, or a number in lists and tuples, is infinite or NaN.

    >>> _is_finite([(None, ()), (-1.5, ((7, -0.5),))]), _is_finite([(-math.inf, 3)])
    (True, False)
    """
    if isinstance(result, torch.Tensor):
        return bool(result.isfinite().all())
    if isinstance(result, list | tuple):
        return all(map(_is_finite, result))
    return not isinstance(result, float) or math.isfinite(result)
