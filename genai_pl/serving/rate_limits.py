"""Rate limits: requests and tokens a minute of each client, as buckets that refill continuously (token buckets).

A client is its API key, or without keys its address. Tokens are known only as they are written, so a client may overdraw its
bucket by its running answers, and then waits until the debt is refilled.
"""

import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from genai_pl.serving.answer_streams import WrappedAnswer
from genai_pl.serving.errors import ApiError
from genai_pl.serving.fair_queue import CLIENT

if TYPE_CHECKING:
    from genai_pl.serving.answer_streams import Answer
    from genai_pl.serving.engine.request import TokenOutput

MAX_CLIENTS = 10_000  # with buckets; the one that was idle for longest is forgotten first
MINUTE = 60.0


class RateLimits:
    """The buckets of all clients, for one event loop.

    requests, tokens: a minute, which is also what a bucket holds; None: no limit
    now: seconds of a clock that never goes back
    """

    def __init__(
        self, requests: float | None, tokens: float | None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits, self.now = {"requests": requests, "tokens": tokens}, now
        self.buckets: dict[str, OrderedDict[str, tuple[float, float]]] = {name: OrderedDict() for name in self.limits}

    def admit(self) -> None:
        """Count a request of the current client; ApiError 429 with Retry-After if a bucket of it is empty."""
        for name, least in (("requests", 1.0), ("tokens", 0.0)):
            limit = self.limits[name]
            if limit is None:
                continue
            level = self._level(name)
            if level < least or level <= 0:
                # seconds until there is a request, or a token, again
                seconds = max(1, math.ceil((max(least, 1.0) - level) * MINUTE / limit))
                option = f"{name}_per_minute={limit:g}"
                message = f"more than {limit:g} {name} a minute ({option}): try again in {seconds} seconds"
                raise ApiError(429, message, headers={"Retry-After": str(seconds)})
        self._take("requests", 1)

    def spend(self, n: int) -> None:
        """Count tokens of the current client."""
        self._take("tokens", n)

    def metered(self, answer: "Answer") -> "Answer":
        """The answer, whose tokens are counted as they are read."""
        return answer if self.limits["tokens"] is None else MeteredAnswer(answer, self.spend)

    def _level(self, name: str) -> float:
        """What the bucket of the current client holds now; below 0 after an overdraft."""
        limit = self.limits[name]
        level, then = self.buckets[name].get(CLIENT.get(""), (limit, self.now()))
        return min(limit, level + (self.now() - then) * limit / MINUTE)

    def _take(self, name: str, n: int) -> None:
        if self.limits[name] is None:
            return
        buckets, client = self.buckets[name], CLIENT.get("")
        buckets[client] = (self._level(name) - n, self.now())
        buckets.move_to_end(client)
        if len(buckets) > MAX_CLIENTS:
            buckets.popitem(last=False)


class MeteredAnswer(WrappedAnswer):
    """An answer whose tokens are reported one by one, as they are read."""

    def __init__(self, answer: "Answer", spend: Callable[[int], None]) -> None:
        super().__init__(answer)
        self.spend = spend

    async def __aiter__(self) -> "AsyncIterator[TokenOutput]":
        async for output in self.answer:
            self.spend(1)
            yield output
