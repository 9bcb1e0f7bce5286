"""Answer streams: outputs of the engine, recorded for the cache on their way, or replayed from it.

An entry of the cache is text: a line with the finish reason as JSON, then one JSON list for each token. Whoever can write to a
shared cache can write anything, so `decode_answer` checks every value before it becomes an output.
"""

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
COMPLETE = ("stop", "length")  # finish reasons of answers that another request may get


class Answer(Protocol):
    """An asynchronous iterator of outputs.

    finish_reason: None until the last output is read
    n_generated: tokens so far
    n_cached: tokens of the prompt that the prefix cache had
    cancel: ends the answer, from any thread
    """

    finish_reason: str | None
    n_generated: int
    n_cached: int

    def __aiter__(self) -> "AsyncIterator[TokenOutput]": ...
    def cancel(self) -> None: ...


def is_repeatable(request: "Request") -> bool:
    """True if the same request always gets the same answer: greedy decoding, or a seed."""
    return request.config.temperature == 0 or request.seed is not None


def request_key(model: str, request: "Request") -> str:
    """Cache key of a repeatable request's answer.

    model: hash of weights, configuration, tokenizer and adapter, so that servers of different models may share a cache

    The seed of a greedy request is left out, as it changes nothing; client, deadline and group never enter.
    """
    seed = None if request.config.temperature == 0 else request.seed
    return key_of(model, request.input_ids, vars(request.config), seed, request.logprobs)


class WrappedAnswer:
    """An answer around another one, which a subclass reads in its `__aiter__`."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reason

    @property
    def n_generated(self) -> int:
        return self.answer.n_generated

    @property
    def n_cached(self) -> int:
        return self.answer.n_cached

    def cancel(self) -> None:
        self.answer.cancel()


class RecordingStream(WrappedAnswer):
    """An engine's stream that hands the encoded answer to `keep` once the last output is read.

    An answer that is cancelled, late or failed is not kept, nor one whose reader leaves before the end.
    """

    def __init__(self, stream: "TokenStream", keep: Callable[[bytes], Awaitable[None]]) -> None:
        super().__init__(stream)
        self.keep = keep

    async def __aiter__(self) -> "AsyncIterator[TokenOutput]":
        lines = []  # encoded one by one: all at the end would hold the event loop for a long answer
        async for output in self.answer:
            lines.append(_line(output))
            yield output
        if self.finish_reason in COMPLETE:
            await self.keep(_join_lines(self.finish_reason, lines))


class CachedAnswer:
    """A complete answer out of the cache, with the interface of a stream."""

    def __init__(self, finish_reason: str, n_generated: int, outputs: "list[TokenOutput]") -> None:
        self.finish_reason: str | None = finish_reason
        self.n_generated, self.n_cached = n_generated, 0
        self.outputs = outputs

    def cancel(self) -> None:
        """Do nothing: no slot is in use."""

    async def __aiter__(self) -> "AsyncIterator[TokenOutput]":
        for output in self.outputs:
            yield output
            await asyncio.sleep(0)  # the loop's other tasks run between two outputs, although none is waited for


def encode_answer(finish_reason: str, outputs: "Sequence[TokenOutput]") -> bytes:
    """The entry of the cache for an answer."""
    return _join_lines(finish_reason, map(_line, outputs))


def _line(output: "TokenOutput") -> str:
    return json.dumps((output.text, output.token, output.logprob, output.top))


def _join_lines(finish_reason: str, lines: Iterable[str]) -> bytes:
    return "\n".join([json.dumps(finish_reason), *lines]).encode()


def decode_answer(contents: bytes) -> CachedAnswer | None:
    """The answer of an entry; None, and a line in the log, if the contents are anything but a complete answer."""
    try:
        first, *lines = contents.decode().split("\n")
        outputs = [_parse_output(json.loads(line)) for line in lines]
        # the header is the finish reason; an answer without tokens is never recorded
        if (finish_reason := json.loads(first)) not in COMPLETE or not outputs:
            raise ValueError("it is not whole")
    except (ValueError, TypeError, RecursionError) as error:
        log.warning("cache: an entry is no answer (%s)", type(error).__name__)
        return None
    return CachedAnswer(finish_reason, len(outputs), outputs)


def _parse_output(value: object) -> "TokenOutput":
    """The output of a list [text, token, logprob, top]; ValueError or TypeError for any other value."""
    from genai_pl.serving.engine.request import TokenOutput

    text, token, logprob, top = value
    alternatives = tuple((_token(t), _logprob(p)) for t, p in top)
    if not isinstance(text, str) or (logprob is None and alternatives):
        raise TypeError("no output of an answer")
    text.encode()  # fails for half a surrogate pair, which no answer can be sent with
    return TokenOutput(text, _token(token), None if logprob is None else _logprob(logprob), alternatives)


def _token(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError("no token")
    return value


def _logprob(value: object) -> float:
    if type(value) is not float or math.isnan(value) or value > 1e-3:
        raise ValueError("no log-probability")
    return value
