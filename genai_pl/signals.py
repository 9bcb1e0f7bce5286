"""Signals that ask a command to end: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, by which Slurm warns that time is running out.

Handlers only record. Where nothing can be saved they raise `Stopped`; where a run can, it asks `received_signal()` between two
steps. A thread of its own, which also runs while the main thread waits for another process in a collective, ends the
process when its time is over.
"""

import math
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

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
GRACE_PERIOD = (
    30.0  # seconds, where the configuration has not been read yet: what Kubernetes and Slurm wait before they kill
)
MARGIN = 0.95  # of the grace period: at its end whoever sent the signal kills
UNWIND = 3.0  # seconds that the main thread has to end by itself where nothing is to be saved
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # set in all processes that a launcher starts


class Stopped(SystemExit):
    """The end of a command by a signal; `code` is its exit status."""

    def __init__(self, signum: int) -> None:
        super().__init__(exit_status(signum))
        self.signum = signum


def exit_status(signum: int) -> int:
    """130 after Ctrl-C, 143 after SIGTERM and after SIGUSR1, which means the same."""
    return 128 + (signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)


STATUSES = tuple(exit_status(signum) for signum in SIGNALS)


class SignalWatch:
    """The handlers of this process, and the thread that keeps the time after a signal.

    `waits` says whether a signal lets the run save itself first, within `period` seconds; `describe` what it has saved.
    """

    period = GRACE_PERIOD  # of the process, and of those that it forks

    def __init__(self) -> None:
        self.signum: int | None = None  # the first signal received
        self.waits = False
        self.describe: Callable[[], str] = str
        self._deadline = math.inf
        self._handled: list[int] = []  # signals that the main thread has seen
        self._noted: list[int] = []  # signals that the thread has seen
        self._before: dict[int, object] = {}
        self._fd_before = -1
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._keep_time, name="signals", daemon=True)

    def start(self) -> None:
        """Install the handlers; the interpreter writes the number of each signal to a socket, whatever the main thread does."""
        self._thread.start()
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            self._before[signum] = signal.signal(signum, self._record)

    def restore(self) -> None:
        """Put back the handlers that were there before, where they are still ours."""
        signal.set_wakeup_fd(self._fd_before, warn_on_full_buffer=False)
        for signum, handler in self._before.items():
            if signal.getsignal(signum) == self._record:
                signal.signal(signum, handler)

    def close(self) -> None:
        """End the thread."""
        self.restore()
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _record(self, signum: int, frame: FrameType | None) -> None:
        self._handled.append(signum)
        self.signum = self.signum or signum
        second_interrupt = signum == signal.SIGINT and self._handled.count(signum) == 2
        # where nothing is saved, a second one must not disturb cleaning up
        if second_interrupt if self.waits else len(self._handled) == 1:
            raise Stopped(signum)

    def _keep_time(self) -> None:
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


_watches: list[SignalWatch] = []  # of this process: one or none
AT_END: list[Callable[[], None]] = []  # what `end_process` does first
_ending = threading.Lock()


@contextmanager
def handle_signals() -> Iterator[None]:
    """Answer signals inside: a command that they end says so in one line and leaves by Stopped.

    Does nothing where they are answered already, and outside of the main thread, where Python takes no handlers.
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
    """The first signal that this process was sent; None for none."""
    return _watches[-1].signum if _watches else None


def end_at_once(message: str, *, grace_period: float) -> None:
    """Let the next signal end the command at once: nothing is there to be saved, as `message` says.

    Stopped if there was one already, by which a sweep ends before its next job.
    """
    SignalWatch.period = _checked(grace_period)
    if _watches:
        watch = _watches[-1]
        watch.waits, watch.describe = False, lambda: message
        if watch.signum is not None:
            raise Stopped(watch.signum)


def _checked(seconds: object) -> float:
    """The seconds of trainer.grace_period; ConfigError for what are none."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ConfigError(f"trainer.grace_period={seconds}: give the seconds that a run has to be saved in, above 0")
    return float(seconds)


def save_first(describe: Callable[[], str]) -> None:
    """Let signals wait from here on: the run asks for them, saves itself and ends within the grace period.

    Stopped if there was one already.
    """
    if _watches:
        watch = _watches[-1]
        if watch.signum is not None and not watch.waits:
            raise Stopped(watch.signum)
        watch.describe, watch.waits = describe, True


def grace_period() -> float:
    """Seconds in which this process must have ended when something asks it to."""
    return SignalWatch.period


def last_line(signum: int) -> str:
    """By which signal the process ends, and what it has saved."""
    message = _watches[-1].describe() if _watches else ""
    return f"stopped     by {signal.Signals(signum).name}" + (f": {message}" if message else "")


def end_process(line: str, status: int) -> NoReturn:
    """End this process from any thread, whatever the others do: nothing half-written is left, and one line says why."""
    _ending.acquire()  # never released: only one thread ends it
    for action in [*AT_END, remove_unfinished]:
        _try(action)
    say(line)
    _try(sys.stdout.flush)
    os._exit(status)


def say(line: str) -> None:
    """Write a line to stderr for all processes of a run."""
    if line and all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES):
        _try(lambda: os.write(2, f"{line}\n".encode()))


def _try(action: Callable[[], object]) -> None:
    """Do what may fail, or wait for ever: for a lock that the main thread holds, a full pipe, a disk that is gone."""

    def act() -> None:
        with suppress(Exception):
            action()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(timeout=1.0)


def outlive_signals(worker: int) -> None:
    """For processes that load data: what is sent to all processes of a run ends them only after the run had its time.

    A SIGALRM, which nobody handles, ends them should nobody else have.
    """
    seconds = math.ceil(grace_period()) + 5
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: signal.alarm(seconds))


def _forget_in_child() -> None:
    """Processes that are forked end by signals as ever, and do not wake the thread of their parent."""
    while _watches:
        _watches.pop().restore()


os.register_at_fork(after_in_child=_forget_in_child)
