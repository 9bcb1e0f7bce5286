"""JSON answers of any size: encoded in a thread, part by part, and sent in chunks.

json.dumps holds the GIL for the whole value, so large values are given to it in small parts. Parts come from iterators (the
choices, their log-probabilities), so that few of their objects exist at a time: Python's garbage collector scans all container
objects from time to time, and nothing else runs meanwhile.
"""

import asyncio
import json
from collections.abc import Callable, Iterator

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

DEPTH = 6  # levels that are encoded one by one: choices, logprobs, tokens
CHUNK_CHARS = 1 << 16  # JSON characters that become bytes, and are sent, at a time


async def json_answer(make: Callable[[], object]) -> Response:
    """Response with the value that `make` returns; both `make` and the encoding run in a thread."""
    return ChunkedJSONResponse(await asyncio.to_thread(lambda: json_chunks(make())))


class ChunkedJSONResponse(Response):
    """Response whose body is sent chunk by chunk, each once the client has read enough of the last.

    chunks: the body in UTF-8
    """

    media_type = "application/json"

    def __init__(self, chunks: list[bytes]) -> None:
        super().__init__(headers={"content-length": str(sum(map(len, chunks)))})
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0)  # the loop's other tasks run, even if the client reads as fast as chunks are sent
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_chunks(value: object, *, in_ascii: bool = False) -> list[bytes]:
    """The value as JSON in chunks of about CHUNK_CHARS; iterators in it become lists.

    in_ascii: escape other characters, as events of a stream do

    >>> json_chunks({"a": iter([1, 2])})
    [b'{"a":[1,2]}']
    """
    writer = _JSONWriter(in_ascii)
    writer.write(value, DEPTH)
    writer.encode()
    return writer.chunks


class _JSONWriter:
    """Collects JSON texts, and encodes them whenever there are CHUNK_CHARS characters."""

    def __init__(self, in_ascii: bool) -> None:
        self.in_ascii, self.chunks, self.texts, self.n = in_ascii, [], [], 0

    def write(self, value: object, depth: int) -> None:
        """Add a value; lists of containers and objects are added item by item down to `depth` levels."""
        if isinstance(value, Iterator) or (depth > 0 and isinstance(value, list) and _is_nested(value)):
            self._add("[")
            for n, item in enumerate(value):
                if n:
                    self._add(",")
                self.write(item, depth - 1)
            self._add("]")
        elif depth > 0 and isinstance(value, dict) and value:
            for n, (name, item) in enumerate(value.items()):
                self._add(f"{',' if n else '{'}{self._dumps(str(name))}:")
                self.write(item, depth - 1)
            self._add("}")
        else:
            self._add(self._dumps(value))

    def encode(self) -> None:
        """Turn the collected texts into a chunk."""
        self.chunks.append("".join(self.texts).encode())
        self.texts, self.n = [], 0

    def _add(self, text: str) -> None:
        self.texts.append(text)
        self.n += len(text)
        if self.n >= CHUNK_CHARS:
            self.encode()

    def _dumps(self, value: object) -> str:
        return json.dumps(value, ensure_ascii=self.in_ascii, allow_nan=False, separators=(",", ":"))


def _is_nested(value: list) -> bool:
    # a list of numbers, such as a vector, is encoded at once
    return bool(value) and isinstance(value[0], dict | list)
