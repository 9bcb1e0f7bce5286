"""Log limits: a repeated line is written once a minute with the number of repeats, so that clients cannot fill the disk."""

import logging
import time
from collections.abc import Callable

SECONDS = 60.0  # between two copies of the same line
NAMES = ("genai_pl.serving", "uvicorn.error", "asyncio")
MAX_LINES = 1024  # that are remembered; all are forgotten when there are more


class RepeatFilter(logging.Filter):
    """Logging filter that drops a line for SECONDS after the same line was written.

    now: clock in seconds

    Two lines are the same if logger, first line of the message and exception agree.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.now = now
        self.last_logged: dict[
            tuple[str, str, str], tuple[float, int]
        ] = {}  # (time written, repeats since) of each line

    def filter(self, record: logging.LogRecord) -> bool:
        """True if the record is written; its message gets the number of repeats that were dropped before it."""
        error = repr(record.exc_info[1]) if record.exc_info else ""
        key = (
            record.name,
            record.getMessage().split("\n")[0],
            error,
        )  # asyncio's further lines name the socket, which differs
        before, n = self.last_logged.get(key, (-SECONDS, 0))
        if self.now() - before < SECONDS:
            self.last_logged[key] = (before, n + 1)
            return False
        if len(self.last_logged) >= MAX_LINES:
            self.last_logged.clear()
        self.last_logged[key] = (self.now(), 0)
        if n:
            record.msg, record.args = f"{record.getMessage()} (and {n} times more)", ()
        return True


def limit_repeated_lines() -> None:
    """Add the filter to the loggers of a server, once for each."""
    for name in NAMES:
        logger = logging.getLogger(name)
        if not any(isinstance(one, RepeatFilter) for one in logger.filters):
            logger.addFilter(RepeatFilter())
