"""Whose turn it is: clients take turns, and what one client asked for is done in the order in which it came."""

import asyncio
import ipaddress
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from itertools import accumulate, islice
from typing import Generic, TypeVar

from genai_pl.serving.errors import too_busy

T = TypeVar("T")
MOST_KEPT = 64  # clients that ask for nothing now, of which it is known what they have had
CLIENT: ContextVar[str] = ContextVar("client", default="")  # who asks: a key, else an address


def network(address: str) -> str:
    """Whom an address belongs to: of version 6 one customer has as many as he likes, which share 64 bits."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


class Full(Exception):
    """No more can wait."""


class FairQueue(Generic[T]):
    """At most `limit` things that wait, by client: self-clocked fair queueing (Golestani 1994) of what they cost.

    Each client's first has a tag, its cost added to that of the client's last one or to the present, which is the tag of
    what was taken last; the least tag is next. A client that has more in a full queue than another loses its last one to
    the other, and gets in no more itself.
    """

    def __init__(self, limit: int, cost: Callable[[T], float] = lambda item: 1.0) -> None:
        self.limit, self.cost = limit, cost
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # of equal tags the first client's is next
        self._n = 0
        self._virtual_time = 0.0
        self._finish_tags: dict[str, float] = {}  # the tag of each client's last one, unless it lies in the past

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[T]:
        """All of them as their turns would come."""
        tagged = []
        for client, line in self._waiting.items():
            tags = accumulate((self.cost(item) for item in line), initial=self._finish_tags[client])
            tagged += zip(islice(tags, 1, None), line, strict=True)
        return (item for _, item in sorted(tagged, key=lambda pair: pair[0]))

    def add(self, client: str, item: T, *, force: bool = False) -> T | None:
        """Let it wait; what has to leave for it, if the queue was full. Full if nobody has more in it than this client."""
        if not force and not self.accepts(client):
            raise Full
        evicted = None if force or self._n < self.limit else self._evict()
        if client not in self._waiting:
            self._waiting[client] = deque()
            self._finish_tags[client] = max(self._virtual_time, self._finish_tags.get(client, 0.0))
        self._waiting[client].append(item)
        self._n += 1
        return evicted

    def remove(self, client: str, item: T) -> bool:
        """Whether it waited; now it does not."""
        if item not in self._waiting.get(client, ()):
            return False
        self._waiting[client].remove(item)
        self._n -= 1
        if not self._waiting[client]:
            del self._waiting[client]
            self._forget()
        return True

    def dequeue(self, client: str, item: T) -> None:
        """It is this one's turn: its client has had what it costs."""
        if item in self._waiting.get(client, ()):
            self._finish_tags[client] += self.cost(item)
            self._virtual_time = max(self._virtual_time, self._finish_tags[client])
            self._waiting.move_to_end(client)
            self.remove(client, item)

    def refund(self, client: str, cost: float) -> None:
        """So much less than it seemed was what the client has had."""
        if client in self._finish_tags:
            self._finish_tags[client] -= cost

    def peek(self) -> tuple[str, T]:
        """The client whose turn it is, and its first; there has to be one."""
        client = min(self._waiting, key=lambda name: self._finish_tags[name] + self.cost(self._waiting[name][0]))
        return client, self._waiting[client][0]

    def _forget(self) -> None:
        """Keep no tags of clients that would begin at the present anyhow."""
        if len(self._finish_tags) > 2 * len(self._waiting) + MOST_KEPT:
            past = [
                name
                for name, tag in self._finish_tags.items()
                if tag <= self._virtual_time and name not in self._waiting
            ]
            for name in past:
                del self._finish_tags[name]

    def accepts(self, client: str) -> bool:
        """Whether another one of this client may wait."""
        most = max(map(len, self._waiting.values()), default=0)
        return self._n < self.limit or most > len(self._waiting.get(client, ())) + 1

    def _evict(self) -> T:
        greediest = max(self._waiting, key=lambda name: len(self._waiting[name]))
        last = self._waiting[greediest][-1]
        self.remove(greediest, last)
        return last


class FairLock:
    """A thing that one request has at a time; at most `limit` others wait for it (ApiError 429)."""

    def __init__(self, limit: int) -> None:
        self.waiting: FairQueue[asyncio.Future[None]] = FairQueue(limit)
        self.is_taken = False

    @asynccontextmanager
    async def acquire(self, *, force: bool = False) -> AsyncIterator[None]:
        """Have it inside; `force`: wait for it even where too many do, as a request does that has begun."""
        if self.is_taken:
            await self._wait(CLIENT.get(), force=force)
        self.is_taken = True
        try:
            yield
        finally:
            self._next()

    async def _wait(self, client: str, *, force: bool) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            evicted = self.waiting.add(client, mine, force=force)
        except Full:
            raise too_busy(1.0) from None
        if evicted is not None and not evicted.done():
            evicted.set_exception(too_busy(1.0))
        try:
            await mine
        except asyncio.CancelledError:
            if not self.waiting.remove(client, mine) and mine.done() and not mine.cancelled() and not mine.exception():
                self._next()  # it was given and is not wanted any more
            raise

    def _next(self) -> None:
        while len(self.waiting):
            client, waiting = self.waiting.peek()
            self.waiting.dequeue(client, waiting)
            if not waiting.done():
                waiting.set_result(None)
                return
        self.is_taken = False
