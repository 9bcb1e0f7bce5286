"""Worker start: processes that load data end with the run, neither before it nor after.

Launchers send signals to all processes of a run, which needs its workers until it is saved. And a run may be killed, for
lack of memory say: of that torch's workers know only if the run is their parent, and those of concurrent.futures never.
"""

import math
import os
import signal
from collections.abc import Callable
from functools import partial

from genai_pl.signals import SIGNALS, grace_period, when_parent_ends


def worker_start() -> Callable[[int], None]:
    """The start function of a DataLoader's workers."""
    return partial(_start, math.ceil(grace_period()) + 5)


def end_with_run() -> None:
    """End this process when the one that started it has ended, however that ends."""
    when_parent_ends(partial(os._exit, 1))


def _start(seconds: int, worker: int) -> None:
    """End with the run; a signal ends the worker only after the run has had its grace period.

    SIGALRM, which has no handler, ends the worker if nobody else does.
    """
    end_with_run()
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: signal.alarm(seconds))
