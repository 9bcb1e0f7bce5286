"""Sandbox: programs that a model wrote, each run in a child process of its own with little to use and less to break.

The child (`sandbox_child.py`) gives up network, root, files, further processes and most memory before it runs the
program; this side gives it an empty folder, an empty environment and nothing to read, and kills its process group when
time is up. docs/security.md says what this is not: a machine of its own.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from genai_pl.errors import ConfigError

PASSED, TIMED_OUT, ERROR = "passed", "timed_out", "error"
REASONS = (PASSED, "failed", TIMED_OUT, "memory", ERROR)
CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 60.0  # for Python to start, on a machine that is busy
MOST_BYTES = 2**16  # of a report
MAX_WORKERS = 8
NEEDED = ("LD_LIBRARY_PATH", "PYTHONHOME")  # variables without which some installations of Python do not start
PROBE = "import collections, heapq, itertools, math, re, typing\nassert math.sqrt(4) == 2"


class Limits(NamedTuple):
    """What a program may use: seconds by the clock, and address space in MiB, Python's own included."""

    seconds: float = 5.0
    memory_mib: int = 512


class Outcome(NamedTuple):
    """How a program ended: one of REASONS, and a line of detail.

    failed: an assertion does not hold. error: any other exception, a syntax error, or an end before the tests were through.
    """

    reason: str
    detail: str = ""


class Report(NamedTuple):
    """Lines that a child has written, and whether time ran out; status: negative where a signal ended it."""

    lines: list[bytes]
    timed_out: bool
    status: int


def check_sandbox(limits: Limits) -> dict[str, bool]:
    """Which protections hold on this system, by name; ConfigError where not even a simple program runs in it."""
    report = _run(PROBE, limits._replace(seconds=START_SECONDS))
    protections, outcome = _read(report)
    if protections is None or outcome.reason != PASSED:
        raise ConfigError(f"execute_code=true: the sandbox does not work here ({_last_line(report) or outcome.detail})")
    return protections


def describe_protections(protections: dict[str, bool]) -> str:
    """One line on what holds the programs.

    >>> describe_protections({"network": True, "files": True, "memory": False})
    'no files, no network; not held: memory'
    """
    words = {
        "files": "no files",
        "memory": "limited memory",
        "network": "no network",
        "processes": "no further processes",
        "root": "not root",
        "cpu": "limited time",
    }
    held = [words[name] for name in sorted(protections) if protections[name] and name in words]
    missing = [name if name != "network" else "network (refused by Python alone)" for name in sorted(protections)]
    missing = [words for words, name in zip(missing, sorted(protections), strict=True) if not protections[name]]
    return ", ".join(held) + (f"; not held: {', '.join(missing)}" if missing else "")


def run_programs(
    programs: Sequence[str], limits: Limits, *, on_done: Callable[[int], object] | None = None
) -> list[Outcome]:
    """How each program ends, several at a time, one for each CPU that is there. on_done: called with 1 after each."""

    def judge(program: str) -> Outcome:
        outcome = run_program(program, limits)
        if on_done is not None:
            on_done(1)
        return outcome

    with ThreadPoolExecutor(min(MAX_WORKERS, os.cpu_count() or 1)) as pool:
        return list(pool.map(judge, programs))


def run_program(program: str, limits: Limits) -> Outcome:
    """How a program ends; ConfigError where the sandbox itself does not start."""
    report = _run(program, limits)
    protections, outcome = _read(report)
    if protections is None:
        raise ConfigError(f"execute_code=true: the sandbox does not start ({_last_line(report) or 'no reply in time'})")
    return outcome


def _run(program: str, limits: Limits) -> Report:
    """Start a child in a session of its own, wait for its report, and end whatever is left of it."""
    request = {"program": program, "seconds": limits.seconds, "memory": limits.memory_mib * 2**20}
    environment = {"LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    environment |= {name: os.environ[name] for name in NEEDED if name in os.environ}
    with TemporaryDirectory(prefix="program-") as folder:
        os.chmod(folder, 0o755)  # the child may be another user
        child = subprocess.Popen(
            [sys.executable, "-s", "-c", CHILD.read_text(encoding="utf-8")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment | {"HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        with child:
            try:
                lines, timed_out = _talk(child, json.dumps(request).encode(), limits.seconds)
            finally:
                # before it is reaped: until then its number belongs to no other process
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.stdin = None  # closed by _talk
        return Report(lines, timed_out, child.returncode)


def _talk(child: subprocess.Popen, request: bytes, seconds: float) -> tuple[list[bytes], bool]:
    """Send the request and read lines until the end of the report; the second value is True where time ran out.

    The clock of the program begins with its first line: Python's start is not its fault.
    """
    try:
        with child.stdin as pipe:
            pipe.write(request)
    except BrokenPipeError:  # it ended before; its output says why
        pass
    written, deadline, begun = b"", time.monotonic() + START_SECONDS, False
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while len(written) < MOST_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return written.splitlines(), begun
            more = os.read(child.stdout.fileno(), MOST_BYTES)
            if not more:
                break
            written += more
            if not begun and b"\n" in written and written.startswith(b"{"):
                begun, deadline = True, time.monotonic() + seconds
    # the pipe is closed before the process is gone: its status says whether a limit ended it
    if len(written) < MOST_BYTES:
        try:
            child.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return written.splitlines(), begun
    return written.splitlines(), False


def _read(report: Report) -> tuple[dict[str, bool] | None, Outcome]:
    """Protections, None where the child did not get so far, and the outcome of a report."""
    try:
        protections = json.loads(report.lines[0])
        protections = protections if isinstance(protections, dict) else None
    except (ValueError, IndexError):
        protections = None
    try:
        reason, detail = json.loads(report.lines[1])
        if reason in REASONS and isinstance(detail, str):
            return protections, Outcome(reason, detail)
    except (ValueError, IndexError, TypeError):
        pass
    if report.timed_out or report.status == -signal.SIGXCPU:
        return protections, Outcome(TIMED_OUT)
    ended = f"ended by signal {-report.status}" if report.status < 0 else "ended before its tests were through"
    return protections, Outcome(ERROR, ended)


def _last_line(report: Report) -> str:
    """The last line of a report, for messages."""
    return report.lines[-1].decode(errors="replace")[:200] if report.lines else ""
