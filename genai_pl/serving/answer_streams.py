"""An answer as its tokens come: from the engine, or from the cache, where it is put once it is whole."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from genai_pl.serving.response_cache import key_of

if TYPE_CHECKING:
    from genai_pl.serving.engine.request import Piece, Request, Stream

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
        lines = []  # as they come, so that no step takes long
        async for piece in self.stream:
            lines.append(_line(piece))
            yield piece
        if self.finish in WHOLE:
            await self.keep(_whole(self.finish, lines))


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
            await asyncio.sleep(0)  # nothing has to be waited for: others have their turn


def recorded(finish: str, pieces: "Sequence[Piece]") -> bytes:
    """An answer as it is kept: a line that says why it ended, and one for each piece."""
    return _whole(finish, map(_line, pieces))


def _line(piece: "Piece") -> str:
    return json.dumps((piece.text, piece.token, piece.logprob, piece.top))


def _whole(finish: str, lines: Iterable[str]) -> bytes:
    return "\n".join([json.dumps(finish), *lines]).encode()


def replay(contents: bytes) -> Replayed | None:
    """The answer that `recorded` wrote; None where the contents are anything else."""
    try:
        finish, *lines = contents.decode().split("\n")
        pieces = [_piece(json.loads(line)) for line in lines]
        if (ending := json.loads(finish)) not in WHOLE or not pieces:
            raise ValueError("it is not whole")
    except (ValueError, TypeError, RecursionError) as error:
        log.warning("cache: an entry is no answer (%s)", type(error).__name__)
        return None
    return Replayed(ending, len(pieces), pieces)


def _piece(found: object) -> "Piece":
    """A piece of these JSON values; ValueError or TypeError where they are not those of one."""
    from genai_pl.serving.engine.request import Piece

    text, token, logprob, top = found
    alternatives = tuple((_token(t), _logprob(p)) for t, p in top)
    if not isinstance(text, str) or (logprob is None and alternatives):
        raise TypeError("no piece of an answer")
    text.encode()
    return Piece(text, _token(token), None if logprob is None else _logprob(logprob), alternatives)


def _token(found: object) -> int:
    if type(found) is not int or not 0 <= found < 2**31:
        raise ValueError("no token")
    return found


def _logprob(found: object) -> float:
    if type(found) is not float or math.isnan(found) or found > 1e-3:
        raise ValueError("no log-probability")
    return found
