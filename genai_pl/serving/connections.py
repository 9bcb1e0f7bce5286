"""Connection limits against slow or idle clients (Slowloris and its kin), as a protocol class for uvicorn.

uvicorn itself closes keep-alive connections that are idle. This module adds a deadline for the head of a request, one for the
rest of a body that was refused already, one for a client that does not read its answer, and a bound on the number of
connections that follows from the file descriptors of the process. Bodies have their deadline in http/bodies.py.
"""

import asyncio
import logging
import resource
import time
from collections import Counter

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from genai_pl.serving.fair_queue import network

log = logging.getLogger("genai_pl.serving")
HEAD_SECONDS = 10.0  # for the head of a request to arrive, and for the rest of a body that is ignored
READ_SECONDS = 60.0  # for a client to empty the send buffer, once it is full
# keep-alive, between two requests of a connection: longer than clients (httpx 5 s) and proxies (60 s) wait, because one that the
# server closes while a request is on its way is an error there
IDLE_SECONDS = 75
MAX_CONNECTIONS = 4096
OWN_FILES = 64  # descriptors for files, Redis and an upstream server
LAST_SECONDS = 0.5  # after a signal to stop, for a request that is on its way on a connection that is kept
AHEAD = 65_536  # bytes of pipelined requests that a connection may send before their turn
FEED_BYTES = 8192  # that h11 parses at a time: a chunked body may consist of chunks of one byte


def open_files() -> int:
    """File descriptors that this process may have open (the soft limit of RLIMIT_NOFILE)."""
    n, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**20 if n == resource.RLIM_INFINITY else n


def connection_limits(n_files: int) -> tuple[int, int]:
    """(connections at most, length of the accept backlog) for this many file descriptors.

    asyncio closes a surplus connection some turns of its loop after accepting it, and accepts up to a backlog more in each
    turn: four backlogs of descriptors stay free for that, and OWN_FILES for everything else.

    >>> connection_limits(1024)
    (704, 64)
    """
    at_once = max(8, min(256, n_files // 16))
    return max(8, min(MAX_CONNECTIONS, n_files - 4 * at_once - OWN_FILES)), at_once


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with deadlines and a bound on the number of connections.

    Bytes go to h11 a part at a time, and the loop's other tasks run in between: parsing a body of many tiny chunks would
    otherwise hold every other request.
    """

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.waiting_since = time.monotonic()  # when it last began to wait for a request
        self.deadline: asyncio.TimerHandle | None = (
            None  # closes the connection if no head, or no rest of a body, comes
        )
        self.reading: asyncio.TimerHandle | None = None  # closes it if the client does not read
        self.rest = bytearray()  # received, not yet parsed
        self.address = ""  # of the client, version 6 without its last 64 bits
        self.is_last = False  # the next answer is the connection's last

    @property
    def is_waiting(self) -> bool:
        """True if no request of the connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start the deadline of the first head; drop a waiting connection if there are too many."""
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
        """Stop all deadlines."""
        self._expect(None)
        self._watch_reader(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Buffer the bytes; parsing starts at once unless a part of the buffer is on its way already."""
        is_first = not self.rest
        self.rest += data
        if is_first:
            self._feed()

    def _feed(self) -> None:
        """Parse the next FEED_BYTES of the buffer; the rest after the loop's other tasks."""
        if self.transport.is_closing():
            self.rest.clear()
            return
        data = bytes(self.rest[:FEED_BYTES])
        super().data_received(data)
        del self.rest[:FEED_BYTES]
        if self.is_last and not self.is_waiting:
            self._make_last()
        # a complete head ends its deadline
        if not self.is_waiting:
            self._expect(None)
        elif self.deadline is None:
            self._expect(HEAD_SECONDS)
        # uvicorn pauses reading while a request is answered: undo it, to notice a client that leaves
        if self.flow.read_paused and self.conn.their_state is not h11.SEND_BODY:
            self._read_ahead()
        if self.rest:
            self.transport.pause_reading()
            self.loop.call_soon(self._feed)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

    def _read_ahead(self) -> None:
        """Keep reading during an answer, up to AHEAD bytes of further requests."""
        if len(self.conn.trailing_data[0]) > AHEAD:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Start to wait for the next request, or for the rest of the body if the answer came before its end."""
        self._expect(None)
        unread = self.conn.their_state is h11.SEND_BODY  # for example 413, sent before the body was there
        super().on_response_complete()
        if self.is_last and not self.is_waiting:  # a request that was sent before the answer ended
            self._make_last()
        elif (unread or self.is_last) and not self.transport.is_closing():
            self._expect(HEAD_SECONDS if unread else LAST_SECONDS)
        self.waiting_since = time.monotonic()

    def shutdown(self) -> None:
        """The server stops: answer what runs, and a request that is on its way to a connection that was said to stay open.

        An answer whose head is sent has said so; one that has not begun says in its head that it is the last.
        """
        if self.transport.is_closing():
            return
        self.is_last = True
        if self.is_waiting:
            self._expect(LAST_SECONDS)
        else:
            self._make_last()

    def _make_last(self) -> None:
        """Close after the answer that runs, if its head can still say so."""
        if not self.cycle.response_started:
            self.cycle.keep_alive = False
            self.cycle.scope["headers"] = [*self.cycle.scope["headers"], CLOSE_HEADER]  # uvicorn answers with it

    def pause_writing(self) -> None:
        """Start the client's time to read: the send buffer is full."""
        super().pause_writing()
        self._watch_reader(READ_SECONDS)

    def resume_writing(self) -> None:
        """The client has read enough."""
        super().resume_writing()
        self._watch_reader(None)

    def _superfluous(self) -> "Connection":
        """The connection to drop: of the address with most connections, the one that waits longest; itself if none waits."""
        counts = Counter(one.address for one in self.connections)
        waiting = [one for one in self.connections if one.is_waiting and one is not self]
        return max(waiting, key=lambda one: (counts[one.address], -one.waiting_since), default=self)

    def _expect(self, seconds: float | None) -> None:
        """Close the connection after `seconds` unless called again; None stops the clock."""
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _watch_reader(self, seconds: float | None) -> None:
        if self.reading is not None:
            self.reading.cancel()
        self.reading = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


def connection_options() -> dict[str, object]:
    """uvicorn options for these limits; also raises the process's descriptor limit as far as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _, at_once = connection_limits(open_files())
    return {"http": Connection, "ws": "none", "backlog": at_once, "timeout_keep_alive": IDLE_SECONDS}
