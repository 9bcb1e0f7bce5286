"""Bodies of requests: they arrive within a time, and neither their bytes nor the values in them are too many."""

import asyncio
import re
from contextvars import ContextVar

from starlette.types import Receive

from genai_pl.serving.errors import ApiError, ClientGone, too_busy

SECONDS = 30.0  # for a body to arrive
SMALL = 65_536  # bytes: of these there are never too many, since connections are not
LARGE_AT_ONCE = 32  # times the largest body: what all others may occupy together
HEAVY = 8  # numbers that are as much work as a text, a list or an object
PART = re.compile(rb'["\[{,:]')
RESERVED_BYTES: ContextVar[list[int]] = ContextVar("held")


class Bodies:
    """What is held of all bodies; `max_values` bounds what json and pydantic have to do for one of them.

    A text, a list and an object count as `HEAVY` values, a number as one.
    """

    def __init__(self, *, max_body: int, max_values: int) -> None:
        self.max_body, self.max_values = max_body, max_values
        self.remaining_bytes = max_body * LARGE_AT_ONCE

    async def read(self, receive: Receive, length: bytes) -> bytes:
        """The whole body; ApiError where it is too large or does not come."""
        if length.isdigit() and int(length[:20]) > self.max_body:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._read(receive), SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {SECONDS:.0f} seconds") from None
        if self._may_be_too_many(body) and await asyncio.to_thread(self._are_too_many, body):
            raise ApiError(
                422, f"the body has more than {self.max_values:,} values (a text, list or object counts as {HEAVY})"
            )
        return body

    def release(self) -> None:
        """The request is over, and its body with it."""
        self.remaining_bytes += sum(RESERVED_BYTES.get([]))
        RESERVED_BYTES.set([])

    async def _read(self, receive: Receive) -> bytes:
        body, reserved = bytearray(), RESERVED_BYTES.get()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise self._too_large()
            new = len(body) - SMALL - sum(reserved)
            if new > 0:
                if new > self.remaining_bytes:
                    raise too_busy(2.0)
                self.remaining_bytes -= new
                reserved.append(new)
            if not message.get("more_body", False):
                return bytes(body)

    def _may_be_too_many(self, body: bytes) -> bool:
        light = body.count(b",") + body.count(b":")
        heavy = body.count(b"[") + body.count(b"{") + body.count(b'"') // 2
        return light + HEAVY * heavy > self.max_values

    def _are_too_many(self, body: bytes) -> bool:
        """The same, but for what stands in texts."""
        n = end = 0
        while (part := PART.search(body, end)) is not None:
            n += 1 if part[0] in (b",", b":") else HEAVY
            if n > self.max_values:
                return True
            end = _end_of_text(body, part.end()) if part[0] == b'"' else part.end()
        return False

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body:,} bytes (option max_body_mib)")


def _end_of_text(body: bytes, begin: int) -> int:
    """Where a text ends that begins there: after the first quote that no backslash belongs to."""
    while (quote := body.find(b'"', begin)) >= 0:
        n = quote
        while n > begin and body[n - 1] == ord("\\"):
            n -= 1
        if (quote - n) % 2 == 0:
            return quote + 1
        begin = quote + 1
    return len(body)
