"""A log that clients cannot fill: a line that is said again and again is said once in a while, with how often it was."""

import logging
import time
from collections.abc import Callable

SECONDS = 60.0
NAMES = ("genai_pl.serving", "uvicorn.error", "asyncio")
MOST = 1024  # lines that are remembered


class RepeatFilter(logging.Filter):
    """Lets a line pass, and the same line not for a minute."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.now = now
        self.last_logged: dict[tuple[str, str, str], tuple[float, int]] = {}  # when, and how often since

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is said."""
        error = repr(record.exc_info[1]) if record.exc_info else ""
        key = (record.name, record.getMessage().split("\n")[0], error)  # asyncio adds the socket
        before, n = self.last_logged.get(key, (-SECONDS, 0))
        if self.now() - before < SECONDS:
            self.last_logged[key] = (before, n + 1)
            return False
        if len(self.last_logged) >= MOST:
            self.last_logged.clear()
        self.last_logged[key] = (self.now(), 0)
        if n:
            record.msg, record.args = f"{record.getMessage()} (and {n} times more)", ()
        return True


def limit_repeated_lines() -> None:
    """Let the loggers of a server repeat themselves no more."""
    for name in NAMES:
        logger = logging.getLogger(name)
        if not any(isinstance(one, RepeatFilter) for one in logger.filters):
            logger.addFilter(RepeatFilter())
