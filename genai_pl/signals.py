"""Signals that end a command: SIGTERM, SIGINT (Ctrl-C), and SIGUSR1, by which Slurm announces the end of its time limit.

Handlers only record the signal. Where nothing is worth saving they raise `Stopped`; a training run asks `received_signal()`
between two steps, saves itself and ends. A thread of its own watches the grace period, since the main thread may be blocked
in a collective by a process that has died, and ends the process when the period is over.
"""

import math
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from genai_pl.atomic_io import remove_unfinished
from genai_pl.errors import ConfigError
from genai_pl.ranks import is_first_process

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_PERIOD = 30.0  # seconds, until the configuration is read: the usual wait of Kubernetes and Slurm before SIGKILL
MARGIN = 0.95  # share of the grace period to use: at its end the sender kills
UNWIND = 3.0  # seconds for the main thread to end by itself if nothing is to be saved


class Stopped(SystemExit):
    """The end of a command by a signal. code: exit status. signum: the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(exit_status(signum))
        self.signum = signum


def exit_status(signum: int) -> int:
    """130 after Ctrl-C, 143 after SIGTERM and SIGUSR1.

    >>> exit_status(signal.SIGINT), exit_status(signal.SIGUSR1)
    (130, 143)
    """
    return 128 + (signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)


STATUSES = tuple(exit_status(signum) for signum in SIGNALS)


class SignalWatch:
    """The signal handlers of this process, and the thread that watches the grace period.

    period: seconds of the grace period. waits: True while a signal lets the run save itself first.
    describe: returns what has been saved, for the last line. signum: the first signal received, or None.

    The interpreter runs handlers in the main thread, between two bytecodes; a main thread blocked in C code runs none. It also
    writes each signal's number to a socket (`set_wakeup_fd`) at once, which is how the thread learns of it.
    """

    period = GRACE_PERIOD  # class attribute: child processes that are forked inherit it

    def __init__(self) -> None:
        self.signum: int | None = None
        self.waits = False
        self.describe: Callable[[], str] = str
        self._deadline = math.inf
        self._handled: list[int] = []  # by the main thread, in order
        self._noted: list[int] = []  # by the thread, in order
        self._before: dict[int, object] = {}
        self._fd_before = -1
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._keep_time, name="signals", daemon=True)

    def start(self) -> None:
        """Start the thread and install the handlers."""
        self._thread.start()
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            self._before[signum] = signal.signal(signum, self._record)

    def restore(self) -> None:
        """Reinstall the previous handlers, except where another library has installed its own meanwhile."""
        signal.set_wakeup_fd(self._fd_before, warn_on_full_buffer=False)
        for signum, handler in self._before.items():
            if signal.getsignal(signum) == self._record:
                signal.signal(signum, handler)

    def close(self) -> None:
        """Restore the handlers and end the thread."""
        self.restore()
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _record(self, signum: int, frame: FrameType | None) -> None:
        """The handler: note the signal, and raise `Stopped` unless the run is to save itself first."""
        self._handled.append(signum)
        self.signum = self.signum or signum
        second_interrupt = signum == signal.SIGINT and self._handled.count(signum) == 2
        # saving: a second Ctrl-C ends it. Nothing to save: only the first signal raises, so that cleaning up is not disturbed
        if second_interrupt if self.waits else len(self._handled) == 1:
            raise Stopped(signum)

    def _keep_time(self) -> None:
        """The thread: wait for signals until the deadline, then end the process; returns when the socket is closed."""
        while True:
            timeout = None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())
            if select.select([self._reader], [], [], timeout)[0]:
                numbers = self._reader.recv(64)
                if not numbers:
                    return  # closed
                for signum in numbers:
                    if signum in SIGNALS and signal.getsignal(signum) == self._record:
                        self._note(signum)
            elif time.monotonic() >= self._deadline:
                end_process(last_line(self.signum), exit_status(self.signum))

    def _note(self, signum: int) -> None:
        """Set the deadline by the first signal, and announce the grace period."""
        now = time.monotonic()
        self.signum = self.signum or signum
        self._noted.append(signum)
        if not self.waits or (signum == signal.SIGINT and self._noted.count(signum) == 2):
            self._deadline = min(self._deadline, now + UNWIND)
        elif len(self._noted) == 1:
            self._deadline = now + self.period * MARGIN
            again = "; Ctrl-C again ends it at once" if signum == signal.SIGINT else ""
            name = signal.Signals(signum).name
            say(f"{name}: the run is saved and ends, within {self.period:g} s (trainer.grace_period){again}")


_watches: list[SignalWatch] = []  # one or none per process
AT_END: list[Callable[[], None]] = []  # actions of `end_process`
_ending = threading.Lock()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Context manager: signals end the command inside, with one line that says so, by raising `Stopped`.

    No effect inside another one, and outside of the main thread, where Python allows no handlers.
    """
    if _watches or threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = SignalWatch()
    _watches.append(watch)
    try:
        watch.start()
        yield
    except Stopped as stop:
        say(last_line(stop.signum))
        raise
    finally:
        _watches.pop()
        watch.close()


def received_signal() -> int | None:
    """The first signal that this process received, or None."""
    return _watches[-1].signum if _watches else None


def end_at_once(message: str, *, grace_period: float) -> None:
    """Let the next signal end the command at once, since nothing is worth saving; `message` is its last line.

    Raises `Stopped` if a signal has come before, which ends a sweep before its next job. grace_period: seconds, for later.
    """
    SignalWatch.period = _checked(grace_period)
    if _watches:
        watch = _watches[-1]
        watch.waits, watch.describe = False, lambda: message
        if watch.signum is not None:
            raise Stopped(watch.signum)


def _checked(seconds: object) -> float:
    """The seconds of trainer.grace_period; ConfigError unless they are a positive finite number."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ConfigError(f"trainer.grace_period={seconds}: give the seconds that a run has to be saved in, above 0")
    return float(seconds)


def save_first(describe: Callable[[], str]) -> None:
    """Let signals wait from now on: the run polls `received_signal`, saves itself and ends within the grace period.

    describe: returns what has been saved. Raises `Stopped` if a signal has come before.
    """
    if _watches:
        watch = _watches[-1]
        if watch.signum is not None and not watch.waits:
            raise Stopped(watch.signum)
        watch.describe, watch.waits = describe, True


def grace_period() -> float:
    """Seconds within which this process must end after a signal."""
    return SignalWatch.period


def last_line(signum: int) -> str:
    """The last line of a command that a signal ended: the signal, and what was saved."""
    message = _watches[-1].describe() if _watches else ""
    return f"stopped     by {signal.Signals(signum).name}" + (f": {message}" if message else "")


def end_process(line: str, status: int) -> NoReturn:
    """End this process from any thread: run AT_END, remove unfinished files, write one line, exit with `status`.

    os._exit, because the main thread may never return from what blocks it.
    """
    _ending.acquire()  # never released: only one thread ends it
    for action in [*AT_END, remove_unfinished]:
        _try(action)
    say(line)
    _try(sys.stdout.flush)
    os._exit(status)


def say(line: str) -> None:
    """Write a line to stderr, in the first process of a run only.

    os.write, because the main thread may hold the lock of sys.stderr.
    """
    if line and is_first_process():
        _try(lambda: os.write(2, f"{line}\n".encode()))


def _try(action: Callable[[], object]) -> None:
    """Run an action for at most a second, ignoring errors: it may wait for a lock of the main thread or a full pipe."""

    def act() -> None:
        with suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(timeout=1.0)


def when_parent_ends(then: Callable[[], object]) -> None:
    """Call a function in a thread of this process of multiprocessing when the process that started it has ended, even by SIGKILL.

    Its parent's number does not tell: under "forkserver" (Python 3.14's default on Linux) that is a server, which lives
    as long as the processes that it has forked.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), then()), name="parent", daemon=True).start()


def _forget_in_child() -> None:
    """In a forked child: restore the default handlers, and do not wake the parent's thread."""
    while _watches:
        _watches.pop().restore()


os.register_at_fork(after_in_child=_forget_in_child)
