"""Streaming: server-sent events, several answers merged into one stream, and clients that disconnect early."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from genai_pl.serving.errors import ApiError, ClientGone, as_api_error, too_busy

if TYPE_CHECKING:
    from genai_pl.serving.engine.request import TokenOutput
    from genai_pl.serving.service import Answer

T = TypeVar("T")
Events = AsyncGenerator[object, None]  # JSON values, or strings that are JSON already
DONE = "[DONE]"  # OpenAI's last event


async def _gone(receive: Receive) -> None:
    """Return once the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def while_connected(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """Result of the work; if the client disconnects first, the work is cancelled and ClientGone raised."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _end(task, gone)


class EventStream(Response):
    """Response of server-sent events: JSON values one by one, then `[DONE]`.

    first: the first event, which is there already
    rest: the other events; closed when the response ends, however it ends
    is_named: each event has its `type` as the name of the event, and no `[DONE]` follows, as in Anthropic's API and in OpenAI's
        Responses

    An exception on the way becomes an event with the error's JSON, since the status is sent by then.
    """

    media_type = "text/event-stream"

    def __init__(self, first: object, rest: Events, *, is_named: bool = False) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.first, self.rest, self.is_named = first, rest, is_named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await while_connected(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        """Send all events; `send` waits while the client reads slowly."""

        async def say(event: object) -> None:
            text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=True)
            name = f"event: {event['type']}\n" if self.is_named else ""
            await send({"type": "http.response.body", "body": f"{name}data: {text}\n\n".encode(), "more_body": True})

        try:
            await say(self.first)
            async for event in self.rest:
                await say(event)
            if not self.is_named:
                await say(DONE)
        except OSError:
            raise ClientGone from None
        except Exception as error:
            await say(as_api_error(error).body())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def stream_events(request: Request, events: Events, *, is_named: bool = False) -> EventStream:
    """Response of events; waits for the first one, so that an error before it still has its own status."""
    try:
        first = await while_connected(request.receive, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(first, events, is_named=is_named)


@asynccontextmanager
async def cancelled_at_exit(answers: Sequence["Answer"]) -> AsyncIterator[None]:
    """Context that cancels the answers at its end, so that no slot works for a client that has left."""
    try:
        yield
    finally:
        for answer in answers:
            answer.cancel()


async def merged(answers: Sequence["Answer"]) -> AsyncGenerator[tuple[int, "TokenOutput"], None]:
    """(index of the answer, output) of all answers in the order in which outputs arrive.

    Raises ApiError if an answer ends with anything but "stop" or "length".
    """
    queue: asyncio.Queue[tuple[int, TokenOutput | None]] = asyncio.Queue()

    async def pump(n: int, answer: "Answer") -> None:
        try:
            async for output in answer:
                await queue.put((n, output))
                await asyncio.sleep(0)  # let outputs be sent, even if more have arrived already
        finally:
            await queue.put((n, None))

    tasks = [asyncio.ensure_future(pump(n, answer)) for n, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            n, output = await queue.get()
            if output is not None:
                yield n, output
                continue
            await tasks[n]  # raises the exception of its stream, if it had one
            check_finish(answers[n])
            left -= 1
    finally:
        await _end(*tasks)


async def collect(answers: Sequence["Answer"]) -> list[list["TokenOutput"]]:
    """The outputs of each answer, once all have ended."""
    outputs_by_answer: list[list[TokenOutput]] = [[] for _ in answers]
    async with cancelled_at_exit(answers), aclosing(merged(answers)) as outputs:
        async for n, output in outputs:
            outputs_by_answer[n].append(output)
    return outputs_by_answer


def check_finish(answer: "Answer") -> None:
    """Raise the ApiError of a finish reason that no client asked for; "stop" and "length" pass."""
    if answer.finish_reason == "deadline":
        raise ApiError(504, f"not finished in time, after {answer.n_generated} tokens: ask for fewer, or set timeout")
    if answer.finish_reason == "cancelled":
        raise ApiError(503, "the server is stopping", headers={"Retry-After": "5"})
    if answer.finish_reason == "busy":  # evicted from the full queue for a client with fewer requests
        raise too_busy(1.0)
    if answer.finish_reason == "error":
        raise ApiError(500, "the model failed; the log has the reason")
