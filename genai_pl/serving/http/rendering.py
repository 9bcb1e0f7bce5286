"""Answers as bytes of JSON, made beside the event loop and sent in pieces: no step of it takes long, however large they are.

Python looks through all objects that refer to others from time to time, while nothing else runs: of a large answer few are
there at a time, as its parts are made by iterators and become text one by one.
"""

import asyncio
import json
from collections.abc import Callable, Iterator

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

DEPTH = 6  # of an answer's parts that are written one by one: choices, logprobs, tokens
CHUNK_CHARS = 1 << 16  # characters that are encoded and sent at a time


async def json_answer(make: Callable[[], object]) -> Response:
    """The answer that `make` gives, in JSON."""
    return ChunkedJSONResponse(await asyncio.to_thread(lambda: json_chunks(make())))


class ChunkedJSONResponse(Response):
    """A body of JSON that is sent piece by piece, each when the client has room for it."""

    media_type = "application/json"

    def __init__(self, chunks: list[bytes]) -> None:
        super().__init__(headers={"content-length": str(sum(map(len, chunks)))})
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for chunk in self.chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await asyncio.sleep(0)  # others have their turn, even where the client reads as fast as this is sent
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_chunks(value: object, *, in_ascii: bool = False) -> list[bytes]:
    """The value in JSON, in pieces; an iterator is a list, and json.dumps lets nobody else work: it is given small parts."""
    writer = _JSONWriter(in_ascii)
    writer.write(value, DEPTH)
    writer.encode()
    return writer.chunks


class _JSONWriter:
    """Texts, which become bytes when there are PIECE characters of them."""

    def __init__(self, in_ascii: bool) -> None:
        self.in_ascii, self.chunks, self.texts, self.n = in_ascii, [], [], 0

    def write(self, value: object, depth: int) -> None:
        """A value, whose parts are written one by one down to this depth."""
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
        """Make bytes of the texts."""
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
    return bool(value) and isinstance(value[0], dict | list)
