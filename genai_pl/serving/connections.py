"""Connections that cannot be kept for nothing: they are limited in number and in what they may leave undone.

uvicorn closes idle connections; here are the limits that it lacks: for the head of a request, for the rest of one that is
answered already, for a client that does not read its answer, and for how many there are.
"""

import asyncio
import logging
import resource
import time
from collections import Counter

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from genai_pl.serving.fair_queue import network

log = logging.getLogger("genai_pl.serving")
HEAD_SECONDS = 10.0  # for the head of a request to arrive, and for what nobody waits for
READ_SECONDS = 60.0  # for a client to read what it was sent before it is sent more
IDLE_SECONDS = 5  # between two requests
MOST = 4096  # connections
OWN_FILES = 64  # descriptors for files, Redis, and a server behind this one
AHEAD = 65_536  # bytes of requests that are sent before they can be answered
FEED_BYTES = 8192  # bytes that h11 is given at a time: a body may come in chunks of one byte


def open_files() -> int:
    """How many descriptors this process may have."""
    n, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if n == resource.RLIM_INFINITY else n


def connection_limits(n_files: int) -> tuple[int, int]:
    """How many connections there may be, and how many are accepted at once, so that descriptors never run out.

    asyncio closes one some turns of its loop after it has accepted it, and meanwhile accepts more.
    """
    at_once = max(8, min(256, n_files // 16))
    return max(8, min(MOST, n_files - 4 * at_once - OWN_FILES)), at_once


class Connection(H11Protocol):
    """uvicorn's, with an end to everything that a client may leave undone."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.waiting_since = time.monotonic()  # of waiting for a request
        self.deadline: asyncio.TimerHandle | None = None  # for what the client has to do next
        self.reading: asyncio.TimerHandle | None = None  # for the client to read
        self.rest = bytearray()  # received, not yet given to h11
        self.address = ""  # whom it belongs to

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.address = network(self.client[0]) if self.client else ""
        self._expect(HEAD_SECONDS)
        limit, _ = connection_limits(open_files())
        if len(self.connections) > limit:
            victim = self._superfluous()
            log.warning("too many connections, at most %d: those that have asked for nothing yet are closed", limit)
            victim.transport.abort()
            self.connections.discard(victim)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._watch_reader(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        is_first = not self.rest
        self.rest += data
        if is_first:
            self._feed()

    def _feed(self) -> None:
        """Give h11 a piece; the next one when others have had their turn."""
        if self.transport.is_closing():
            self.rest.clear()
            return
        data = bytes(self.rest[:FEED_BYTES])
        super().data_received(data)
        del self.rest[:FEED_BYTES]
        if not self.is_waiting:
            self._expect(None)
        elif self.deadline is None:
            self._expect(HEAD_SECONDS)
        if self.flow.read_paused and self.conn.their_state is not h11.SEND_BODY:
            self._read_ahead()
        if self.rest:
            self.transport.pause_reading()
            self.loop.call_soon(self._feed)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def _read_ahead(self) -> None:
        """Go on to read while a request is answered, or it would not be noticed that the client has left."""
        if len(self.conn.trailing_data[0]) > AHEAD:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        self._expect(None)
        unread = self.conn.their_state is h11.SEND_BODY  # an answer that did not wait for the body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._expect(HEAD_SECONDS)
        self.waiting_since = time.monotonic()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(READ_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_reader(None)

    def _superfluous(self) -> "Connection":
        """The one that goes: of the address with most of them, that which has waited longest; this one if none waits."""
        counts = Counter(one.address for one in self.connections)
        waiting = [one for one in self.connections if one.is_waiting and one is not self]
        return max(waiting, key=lambda one: (counts[one.address], -one.waiting_since), default=self)

    def _expect(self, seconds: float | None) -> None:
        """Close it after this time; None: nothing is expected of the client any more."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _watch_reader(self, seconds: float | None) -> None:
        if self.reading is not None:
            self.reading.cancel()
        self.reading = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


def connection_options() -> dict[str, object]:
    """Options of uvicorn for connections; the process is given as many descriptors as it may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _, at_once = connection_limits(open_files())
    return {"http": Connection, "ws": "none", "backlog": at_once, "timeout_keep_alive": IDLE_SECONDS}
