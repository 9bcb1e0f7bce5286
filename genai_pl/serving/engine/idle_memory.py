"""Memory that an idle engine gives back: the KV cache of the batch, and pages that the C library keeps for later."""

import ctypes
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

IDLE_SECONDS = 5.0  # without work, after which memory is given back: it takes up to a tenth of a second


def wait_for_work(changed: threading.Condition, is_over: Callable[[], bool], release: Callable[[], None]) -> None:
    """Wait on a condition until `is_over`; once the wait is long, release what a burst of requests has left."""
    with changed:
        was_short = changed.wait_for(is_over, IDLE_SECONDS)
    if not was_short:
        release()
        return_freed_memory()
        with changed:
            changed.wait_for(is_over)


def return_freed_memory() -> None:
    """Give freed pages of the heap back to the operating system: malloc_trim(3) of glibc; elsewhere nothing happens."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library, as Alpine's
            ctypes.CDLL(None).malloc_trim(0)
