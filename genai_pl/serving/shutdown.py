"""Shutdown: after SIGTERM or SIGINT a process drains, breaks off what still runs, and exits in any case.

0 s             uvicorn stops accepting connections, requests that run go on
drain           requests that still run are cancelled and answered with 503
drain + 2 s     uvicorn cuts the connections (server.server_options)
drain + 4 s     the process exits whatever runs: a pass of a model on a CPU cannot be interrupted
"""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger("genai_pl.serving")
TO_GIVE_UP = 2.0  # seconds after the drain in which cancelled answers reach their clients
TO_END = 4.0  # seconds after the drain until the process ends whatever runs
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stop_in_time(drain: float, give_up: Callable[[], None]) -> Callable[[], None]:
    """Let SIGTERM and SIGINT also start the clock of this module; returns a function that restores the handlers.

    drain: seconds until `give_up` is called in the event loop
    give_up: cancels what runs

    Must be called in the event loop after uvicorn has set its handlers, which still run. Off the main thread, where Python
    has no signal handlers (tests), nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    loop, before = asyncio.get_running_loop(), {number: signal.getsignal(number) for number in SIGNALS}
    is_begun = False

    # the first signal starts both clocks; every one goes on to the handler that was there before
    def begin(number: int, frame: FrameType | None) -> None:
        nonlocal is_begun
        if not is_begun:
            is_begun = True
            threading.Thread(target=_end_after, args=(drain + TO_END,), name="end", daemon=True).start()
            loop.call_soon_threadsafe(loop.call_later, drain, give_up)
        if callable(before[number]):
            before[number](number, frame)

    def undo() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is begin:
                signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, begin)
    return undo


def _end_after(seconds: float) -> None:
    # a thread, since the event loop may be what is stuck; os._exit, since a stuck thread would block a normal exit
    threading.Event().wait(seconds)
    log.warning("something still runs %.0f seconds after the signal to stop: the process ends without it", seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
