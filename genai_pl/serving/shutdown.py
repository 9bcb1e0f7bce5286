"""The end of a process that was told to stop: what runs has a time to finish, and then it ends whatever runs."""

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

log = logging.getLogger("genai_pl.serving")
TO_GIVE_UP = 2.0  # seconds after the drain for answers that are broken off, and their clients
TO_END = 4.0  # seconds after the drain until the process ends whatever runs
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stop_in_time(drain: float, give_up: Callable[[], None]) -> Callable[[], None]:
    """Let a signal also start the clock: `give_up` after `drain` seconds, the end soon after; what undoes this.

    To be called in the event loop, after the server has set handlers of its own, which go on as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    loop, before = asyncio.get_running_loop(), {number: signal.getsignal(number) for number in SIGNALS}
    is_begun = False

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
    threading.Event().wait(seconds)
    log.warning("something still runs %.0f seconds after the signal to stop: the process ends without it", seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
