"""An answer as its tokens come: from the engine, or from the cache, where it is put once it is whole."""

import asyncio
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from genai_pl.serving.response_cache import key_of

if TYPE_CHECKING:
    from genai_pl.serving.engine.request import Request, TokenOutput, TokenStream

log = logging.getLogger("genai_pl.serving")
COMPLETE = ("stop", "length")  # how an answer ends that is worth keeping


class Answer(Protocol):
    """Pieces of text one by one; `finish` says why there are no more."""

    finish_reason: str | None
    n_generated: int

    def __aiter__(self) -> "AsyncIterator[TokenOutput]": ...
    def cancel(self) -> None: ...


def is_repeatable(request: "Request") -> bool:
    """Whether the same request gets the same answer."""
    return request.config.temperature == 0 or request.seed is not None


def request_key(model: str, request: "Request") -> str:
    """The name of a repeatable request's answer by the model of that name."""
    seed = None if request.config.temperature == 0 else request.seed
    return key_of(model, request.input_ids, vars(request.config), seed, request.logprobs)


class RecordingStream:
    """The engine's answer, which is handed to `keep` when it is whole."""

    def __init__(self, stream: "TokenStream", keep: Callable[[bytes], Awaitable[None]]) -> None:
        self.stream, self.keep = stream, keep

    @property
    def finish_reason(self) -> str | None:
        return self.stream.finish_reason

    @property
    def n_generated(self) -> int:
        return self.stream.n_generated

    def cancel(self) -> None:
        self.stream.cancel()

    async def __aiter__(self) -> "AsyncIterator[TokenOutput]":
        lines = []  # as they come, so that no step takes long
        async for output in self.stream:
            lines.append(_line(output))
            yield output
        if self.finish_reason in COMPLETE:
            await self.keep(_join_lines(self.finish_reason, lines))


class CachedAnswer:
    """An answer that was kept."""

    def __init__(self, finish_reason: str, n_generated: int, outputs: "list[TokenOutput]") -> None:
        self.finish_reason: str | None = finish_reason
        self.n_generated = n_generated
        self.outputs = outputs

    def cancel(self) -> None:
        """Nothing runs."""

    async def __aiter__(self) -> "AsyncIterator[TokenOutput]":
        for output in self.outputs:
            yield output
            await asyncio.sleep(0)  # nothing has to be waited for: others have their turn


def encode_answer(finish_reason: str, outputs: "Sequence[TokenOutput]") -> bytes:
    """An answer as it is kept: a line that says why it ended, and one for each piece."""
    return _join_lines(finish_reason, map(_line, outputs))


def _line(output: "TokenOutput") -> str:
    return json.dumps((output.text, output.token, output.logprob, output.top))


def _join_lines(finish_reason: str, lines: Iterable[str]) -> bytes:
    return "\n".join([json.dumps(finish_reason), *lines]).encode()


def decode_answer(contents: bytes) -> CachedAnswer | None:
    """The answer that `recorded` wrote; None where the contents are anything else."""
    try:
        first, *lines = contents.decode().split("\n")
        outputs = [_parse_output(json.loads(line)) for line in lines]
        if (finish_reason := json.loads(first)) not in COMPLETE or not outputs:
            raise ValueError("it is not whole")
    except (ValueError, TypeError, RecursionError) as error:
        log.warning("cache: an entry is no answer (%s)", type(error).__name__)
        return None
    return CachedAnswer(finish_reason, len(outputs), outputs)


def _parse_output(value: object) -> "TokenOutput":
    """A piece of these JSON values; ValueError or TypeError where they are not those of one."""
    from genai_pl.serving.engine.request import TokenOutput

    text, token, logprob, top = value
    alternatives = tuple((_token(t), _logprob(p)) for t, p in top)
    if not isinstance(text, str) or (logprob is None and alternatives):
        raise TypeError("no piece of an answer")
    text.encode()
    return TokenOutput(text, _token(token), None if logprob is None else _logprob(logprob), alternatives)


def _token(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError("no token")
    return value


def _logprob(value: object) -> float:
    if type(value) is not float or math.isnan(value) or value > 1e-3:
        raise ValueError("no log-probability")
    return value
