"""Imports of large libraries: without the collections of cyclic garbage between them, and with one line for a Ctrl-C.

Torch, Lightning and transformers make half a million objects while they are imported, all of which stay. Python scans
them again and again for garbage, which takes a third of the time of the imports.
"""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """Context for the first imports of a command: Ctrl-C ends it in a line, with the status that it has later (130).

    An exception would come out of the middle of some library, with its traceback, or be lost in it; nothing is open yet.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where Python allows no handlers
        return
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(signum: int, _frame: object) -> None:
    """The handler: write the line that `genai_pl.signals` ends with, and leave."""
    os.write(2, b"stopped     by SIGINT\n")
    os._exit(128 + signum)


@contextmanager
def collecting_later() -> Iterator[None]:
    """Context for imports: cyclic garbage is collected after it, as the process did before it.

    What was imported counts as old from then on, so the next collections of young objects do not scan it.

    >>> with collecting_later():
    ...     import json
    """
    was_enabled, n_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > n_modules:
            gc.freeze()
            gc.unfreeze()  # into the oldest generation
        if was_enabled:
            gc.enable()
