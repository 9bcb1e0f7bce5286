"""An answer as its tokens come: from the engine, or from the cache, where it is put once it is whole."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import astuple
from typing import TYPE_CHECKING, Protocol

from genai_pl.serving.cache import key_of

if TYPE_CHECKING:
    from genai_pl.serving.requests import Piece, Request, Stream

log = logging.getLogger("genai_pl.serving")
WHOLE = ("stop", "length")  # how an answer ends that is worth keeping


class Answer(Protocol):
    """Pieces of text one by one; `finish` says why there are no more."""

    finish: str | None
    n_generated: int

    def __aiter__(self) -> "AsyncIterator[Piece]": ...
    def cancel(self) -> None: ...


def is_repeatable(request: "Request") -> bool:
    """Whether the same request gets the same answer."""
    return request.config.temperature == 0 or request.seed is not None


def request_key(model: str, request: "Request") -> str:
    """The name of a repeatable request's answer by the model of that name."""
    seed = None if request.config.temperature == 0 else request.seed
    return key_of(model, request.input_ids, vars(request.config), seed, request.logprobs)


class Recorded:
    """The engine's answer, which is handed to `keep` when it is whole."""

    def __init__(self, stream: "Stream", keep: Callable[[bytes], Awaitable[None]]) -> None:
        self.stream, self.keep = stream, keep

    @property
    def finish(self) -> str | None:
        return self.stream.finish

    @property
    def n_generated(self) -> int:
        return self.stream.n_generated

    def cancel(self) -> None:
        self.stream.cancel()

    async def __aiter__(self) -> "AsyncIterator[Piece]":
        pieces = []
        async for piece in self.stream:
            pieces.append(piece)
            yield piece
        if self.finish in WHOLE:
            contents = [self.finish, self.n_generated, [astuple(piece) for piece in pieces]]
            await self.keep(json.dumps(contents).encode())


class Replayed:
    """An answer that was kept."""

    def __init__(self, finish: str, n_generated: int, pieces: "list[Piece]") -> None:
        self.finish: str | None = finish
        self.n_generated = n_generated
        self.pieces = pieces

    def cancel(self) -> None:
        """Nothing runs."""

    async def __aiter__(self) -> "AsyncIterator[Piece]":
        for piece in self.pieces:
            yield piece


def replay(contents: bytes) -> Replayed | None:
    """The answer that `Recorded` kept; None if somebody else wrote there."""
    from genai_pl.serving.requests import Piece

    try:
        finish, n_generated, pieces = json.loads(contents)
        restored = [
            Piece(str(text), int(token), logprob, tuple((int(t), float(p)) for t, p in top))
            for text, token, logprob, top in pieces
        ]
        return Replayed(str(finish), int(n_generated), restored)
    except (ValueError, TypeError) as error:
        log.warning("cache: an entry cannot be read (%s)", error)
        return None
