"""User code: coroutines in one event loop, functions with a time limit, and exceptions as errors of one line.

Rewards and environments are functions of a user. They may be coroutine functions, which then wait together, and they may
raise anything.
"""

import asyncio
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from genai_pl.errors import ConfigError, UserError

_loops: list[asyncio.AbstractEventLoop] = []


def event_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all user code, in a thread of its own, the same for the whole run.

    A client that a reward opens (HTTP connections, say) belongs to the loop that it was opened in: a loop per call
    would break it.
    """
    if not _loops:
        _loops.append(asyncio.new_event_loop())
        threading.Thread(target=_loops[0].run_forever, name="user code", daemon=True).start()
    return _loops[0]


def run_all(coroutines: Sequence[Awaitable[object]]) -> list[object]:
    """The results of coroutines that run together in the event loop, in order; the first exception is raised."""

    async def together() -> list[object]:
        return await asyncio.gather(*map(not_ending, coroutines))

    results = asyncio.run_coroutine_threadsafe(together(), event_loop()).result()
    for result in results:
        if isinstance(result, SystemExit):
            raise result
    return results


async def not_ending(awaitable: Awaitable[object]) -> object:
    """The result of an awaitable, or the SystemExit that it raised, which would end the event loop."""
    try:
        return await awaitable
    except SystemExit as error:
        return error


async def within(seconds: float, function: Callable[[], object], *, is_async: bool) -> object:
    """The result of a function; TimeoutError after so many seconds.

    A coroutine is cancelled then. A plain function runs in a thread of its own, which nothing can end: it goes on, and
    its result is dropped.
    """
    if is_async:
        return await asyncio.wait_for(function(), seconds)
    loop = asyncio.get_running_loop()
    future: asyncio.Future[object] = loop.create_future()

    def settle(result: object, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def work() -> None:
        result, raised = None, None
        try:
            result = function()
        except StopIteration as error:  # which no future takes
            raised = RuntimeError(f"StopIteration {error}".strip())
        except (Exception, asyncio.CancelledError) as error:
            raised = error
        except SystemExit as error:
            raised = RuntimeError(f"it ended with status {error.code}")
        loop.call_soon_threadsafe(settle, result, raised)

    threading.Thread(target=work, name="tool", daemon=True).start()
    return await asyncio.wait_for(future, seconds)


def one_line(error: BaseException) -> str:
    """The message of an exception in one line; half a surrogate pair, which nothing can print, as its escape.

    >>> one_line(ValueError("a\\nb"))
    'a b'
    """
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()


def plain_number(value: object) -> object:
    """A number of numpy or torch, or an array of one, as Python's; anything else as it is.

    >>> plain_number(__import__("numpy").float32(0.5)), plain_number("a")
    (0.5, 'a')
    """
    item = getattr(value, "item", None)
    try:
        return item() if callable(item) else value
    except (TypeError, ValueError, RuntimeError):  # an array of several
        return value


class OneLineErrors:
    """A context that turns exceptions of user code into a one-line ConfigError with the place where it was raised.

    option: the option that names the code, with its value.
    """

    def __init__(self, option: str) -> None:
        self.option = option

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        # no one else cancels user code: a client of its own did
        if not isinstance(error, Exception | SystemExit | asyncio.CancelledError) or isinstance(error, UserError):
            return
        place = traceback.extract_tb(trace)[-1]
        message = one_line(error) or "without a message"
        raise ConfigError(
            f"{self.option}: raised {kind.__name__}, {message} ({Path(place.filename).name}, line {place.lineno})"
        ) from None
