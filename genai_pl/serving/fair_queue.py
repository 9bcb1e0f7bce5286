"""Fair queueing: clients take turns by what their requests cost; requests of one client keep their order."""

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
MAX_IDLE_TAGS = 64  # finish tags of clients without waiting items that are kept before old ones are dropped
CLIENT: ContextVar[str] = ContextVar("client", default="")  # of the current request: hash of its key, else an address


def network(address: str) -> str:
    """The client of an address: itself for IPv4, the /64 network for IPv6, of which one customer has all addresses.

    >>> network("2001:db8:1:2:3::4"), network("10.0.0.1")
    ('2001:db8:1:2::/64', '10.0.0.1')
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


class Full(Exception):
    """Refusal of an item because the queue is full and its client has most in it."""


class FairQueue(Generic[T]):
    """Self-clocked fair queueing (Golestani 1994) over at most `limit` waiting items.

    limit: waiting items of all clients together
    cost: what an item takes of its client's share, for example its tokens; 1 counts items

    A client's next item has the finish tag max(virtual time, the client's last finish tag) + cost, where the virtual time is
    the tag of the item that was taken last; the item with the least tag is next. So a client that asks for ten times the
    tokens gets a tenth of the turns while others wait, and a client that was idle has saved up nothing.

    A full queue evicts the newest item of the client with most items in favour of a client with at least two fewer.

    >>> queue = FairQueue(limit=8)
    >>> for item in ("a1", "a2", "b1"):
    ...     _ = queue.add(client=item[0], item=item)
    >>> list(queue)
    ['a1', 'b1', 'a2']
    """

    def __init__(self, limit: int, cost: Callable[[T], float] = lambda item: 1.0) -> None:
        self.limit, self.cost = limit, cost
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()  # by client; of equal tags the first client's is next
        self._n = 0
        self._virtual_time = 0.0
        self._finish_tags: dict[
            str, float
        ] = {}  # of each client's last dequeued item, unless it is below the virtual time

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[T]:
        """All items in the order of their turns, if no item were added."""
        tagged = []
        for client, line in self._waiting.items():
            tags = accumulate((self.cost(item) for item in line), initial=self._finish_tags[client])
            tagged += zip(islice(tags, 1, None), line, strict=True)
        return (item for _, item in sorted(tagged, key=lambda pair: pair[0]))

    def add(self, client: str, item: T, *, force: bool = False) -> T | None:
        """Add an item to its client's line; the item that was evicted for it, or None.

        force: add it even to a full queue
        Raises Full if the queue is full and no client has enough more items than this one.
        """
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
        """Remove an item without cost to its client; False if it does not wait."""
        if item not in self._waiting.get(client, ()):
            return False
        self._waiting[client].remove(item)
        self._n -= 1
        if not self._waiting[client]:
            del self._waiting[client]
            self._forget()
        return True

    def dequeue(self, client: str, item: T) -> None:
        """Remove an item because its turn has come: its client pays the cost."""
        if item in self._waiting.get(client, ()):
            self._finish_tags[client] += self.cost(item)
            self._virtual_time = max(self._virtual_time, self._finish_tags[client])
            self._waiting.move_to_end(client)
            self.remove(client, item)

    def refund(self, client: str, cost: float) -> None:
        """Give a client back what an item that was dequeued did not use of its cost."""
        if client in self._finish_tags:
            self._finish_tags[client] -= cost

    def peek(self) -> tuple[str, T]:
        """(client, item) whose turn is next; the queue must not be empty."""
        client = min(self._waiting, key=lambda name: self._finish_tags[name] + self.cost(self._waiting[name][0]))
        return client, self._waiting[client][0]

    def _forget(self) -> None:
        """Drop tags below the virtual time, which equal no tag, once there are many: clients may be any number."""
        if len(self._finish_tags) > 2 * len(self._waiting) + MAX_IDLE_TAGS:
            past = [
                name
                for name, tag in self._finish_tags.items()
                if tag <= self._virtual_time and name not in self._waiting
            ]
            for name in past:
                del self._finish_tags[name]

    def accepts(self, client: str) -> bool:
        """True if `add` would take another item of this client."""
        most = max(map(len, self._waiting.values()), default=0)
        return self._n < self.limit or most > len(self._waiting.get(client, ())) + 1

    def _evict(self) -> T:
        """Remove and return the newest item of the client with most items."""
        greediest = max(self._waiting, key=lambda name: len(self._waiting[name]))
        last = self._waiting[greediest][-1]
        self.remove(greediest, last)
        return last


class FairLock:
    """An asyncio lock whose waiters are a FairQueue of clients, at most `limit` of them.

    The current client is the context variable CLIENT. All calls come from one event loop.
    """

    def __init__(self, limit: int) -> None:
        self.waiting: FairQueue[asyncio.Future[None]] = FairQueue(limit)
        self.is_taken = False

    @asynccontextmanager
    async def acquire(self, *, force: bool = False) -> AsyncIterator[None]:
        """Context in which the caller holds the lock; ApiError 429 if too many wait.

        force: wait in any case, for a request that has held the lock before and would lose its work
        """
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
                self._next()  # the lock was handed over just before the cancellation: pass it on
            raise

    def _next(self) -> None:
        """Hand the lock to the waiter whose turn it is, or release it."""
        while len(self.waiting):
            client, waiting = self.waiting.peek()
            self.waiting.dequeue(client, waiting)
            if not waiting.done():
                waiting.set_result(None)
                return
        self.is_taken = False
