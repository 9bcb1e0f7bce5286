"""Request bodies: limits on bytes, JSON values and arrival time, applied before anything parses the body.

4 MiB of `[[[[` or of `{"a":{"a":` cost json and pydantic far more time and memory than 4 MiB of text, so values are limited
beside bytes. The count needs one pass over the bytes and no parser.
"""

import asyncio
import re
from contextvars import ContextVar

from starlette.types import Receive

from genai_pl.serving.errors import ApiError, ClientGone, too_busy

SECONDS = 30.0  # for the whole body to arrive
SMALL = 65_536  # bytes of a body that need no reservation: connections are limited, so these are
LARGE_AT_ONCE = 32  # memory for all larger bodies together, in bodies of the largest size
HEAVY = 8  # a text, list or object is as much work as this many numbers
# what begins a value, or a text in which these characters mean nothing
PART = re.compile(rb'["\[{,:]')
# reservations of the current request, released when it ends
RESERVED_BYTES: ContextVar[list[int]] = ContextVar("held")


class Bodies:
    """Reads bodies within limits, and keeps account of the memory of all that are being answered.

    max_body: bytes of one body
    max_values: values of one body: a number counts 1, a text, list or object HEAVY
    """

    def __init__(self, *, max_body: int, max_values: int) -> None:
        self.max_body, self.max_values = max_body, max_values
        self.remaining_bytes = max_body * LARGE_AT_ONCE

    async def read(self, receive: Receive, length: bytes) -> bytes:
        """The whole body.

        length: the Content-Length header, "0" if there is none
        Raises ApiError 408, 413, 422 or 429, ClientGone if the client disconnects.
        """
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
        """Give back the memory that the current request has reserved."""
        self.remaining_bytes += sum(RESERVED_BYTES.get([]))
        RESERVED_BYTES.set([])

    async def _read(self, receive: Receive) -> bytes:
        """The body; memory beyond SMALL is reserved as it arrives, ApiError 429 if there is none left."""
        body, reserved = bytearray(), RESERVED_BYTES.get()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise self._too_large()
            # reserve what this message added beyond SMALL
            new = len(body) - SMALL - sum(reserved)
            if new > 0:
                if new > self.remaining_bytes:
                    raise too_busy(2.0)
                self.remaining_bytes -= new
                reserved.append(new)
            if not message.get("more_body", False):
                return bytes(body)

    def _may_be_too_many(self, body: bytes) -> bool:
        """True if there could be too many values: an upper bound that also counts characters inside texts."""
        light = body.count(b",") + body.count(b":")
        heavy = body.count(b"[") + body.count(b"{") + body.count(b'"') // 2
        return light + HEAVY * heavy > self.max_values

    def _are_too_many(self, body: bytes) -> bool:
        """True if there are too many values; skips the contents of texts, in a thread for large bodies."""
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
    """Index after the quote that ends a JSON text which begins at `begin`; the end of the body if none does.

    A quote ends the text unless an odd number of backslashes precedes it.

    >>> _end_of_text(b'"a": 1', 1), _end_of_text(rb'"say \\"yes\\"" ]', 1)
    (3, 13)
    """
    while (quote := body.find(b'"', begin)) >= 0:
        n = quote
        while n > begin and body[n - 1] == ord("\\"):
            n -= 1
        if (quote - n) % 2 == 0:
            return quote + 1
        begin = quote + 1
    return len(body)
