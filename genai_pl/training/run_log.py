"""train.log: everything a command prints, warnings included, in order, in the folder of its run.

stdout and stderr are replaced by streams that also feed a RunLog, so that prints, logging, progress bars and
tracebacks end up in one file in the order of the terminal. The folder is known late: lines are held in memory until
`keep` names the file. Text is written as a terminal shows it at the end of each line: carriage returns resolved,
escape sequences removed, secrets redacted. A disk that refuses the log never ends the run.
"""

import logging
import re
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from genai_pl.config.redaction import redact
from genai_pl.errors import reason_of
from genai_pl.ranks import is_first_process

MAX_EARLY_LINES = 10_000  # lines that are kept until the run has a folder
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)")  # of terminals
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class RunLog:
    """Lines of several streams, in memory until they have a file.

    fallback: the stream to report to when the file cannot be written. At most MAX_EARLY_LINES are held.
    """

    def __init__(self, fallback: TextIO) -> None:
        self._fallback = fallback  # gets one line if the log cannot be written
        self._path: Path | None = None
        self._early: deque[str] = deque(maxlen=MAX_EARLY_LINES)
        self._unfinished: dict[int, str] = {}  # lines that have not ended yet, by stream

    def add(self, stream: int, text: str) -> None:
        """Append `text` of one stream; a line is written when its line break comes, so that two streams never
        share one.

        stream: any number that identifies the stream.
        """
        *lines, rest = (self._unfinished.get(stream, "") + text).split("\n")
        self._unfinished[stream] = rest[rest.rstrip("\r").rfind("\r") + 1 :]  # a progress bar overwrites its line
        self._write([line for line in map(_visible_text, lines) if line is not None])

    def keep(self, path: Path) -> None:
        """Write the lines held so far to this file, and all later ones."""
        self._path = path
        self._write([])

    def close(self) -> None:
        """End unfinished lines, and drop the file: what follows belongs to another run of the same process."""
        for stream, text in self._unfinished.items():
            if text:
                self.add(stream, "\n")
        self._path = None
        self._early.clear()

    def _write(self, lines: Iterable[str]) -> None:
        """Write lines, or hold them. An OSError ends the log of this run, once and with a line on the terminal."""
        self._early.extend(lines)
        if self._path is None or not self._early:
            return
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in self._early)
        except OSError as error:  # a run never ends for its log
            if not any(line.startswith("error: ") for line in self._early):  # the disk is reported already
                print(
                    f"log         {self._path}: {reason_of(error)}; the log of this run ends here", file=self._fallback
                )
            self._path = None
        self._early.clear()


def _visible_text(line: str) -> str | None:
    r"""A line as a terminal would leave it; None for a progress bar that was wiped.

    >>> _visible_text("10%\r100%"), _visible_text("50%\r   "), _visible_text("\x1b[31mred\x1b[0m")
    ('100%', None, 'red')
    """
    text = line.rstrip("\r").rpartition("\r")[2]
    if not text.strip() and text != line.rstrip("\r"):
        return None
    return redact(CONTROL.sub("?", ESCAPES.sub("", text)))


class _LoggedStream:
    """A text stream that passes everything on to the original and to a log."""

    def __init__(self, stream: TextIO, log: RunLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        """Write to the original, then to the log: a broken terminal raises before anything is logged."""
        written = self._stream.write(text)
        self._log.add(id(self), text)
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


_log: RunLog | None = None


def keep(path: Path) -> None:
    """Write what this process has printed so far, and all later lines, to a file; no effect outside of
    `recording`.
    """
    if _log is not None:
        _log.keep(path)


@contextmanager
def recording() -> Iterator[None]:
    """Log stdout and stderr inside the context, in the first process of a run.

    Nested: the inner context bounds one run of several, as in a sweep within one process. It also logs the
    traceback that the interpreter prints only after both have ended.
    """
    if not is_first_process():
        yield
        return
    if _log is not None:
        try:
            yield
        except Exception:
            _log.add(0, traceback.format_exc())  # printed by the interpreter after this context ends
            raise
        finally:
            _log.close()
        return
    with _replace_streams():
        yield


@contextmanager
def _replace_streams() -> Iterator[None]:
    """Context in which sys.stdout, sys.stderr and the root logger's handlers feed the log."""
    global _log
    originals = sys.stdout, sys.stderr
    _log = RunLog(sys.stderr)
    sys.stdout, sys.stderr = (_LoggedStream(stream, _log) for stream in originals)
    pairs = [*zip(originals, (sys.stdout, sys.stderr), strict=True)]
    _redirect(pairs)
    try:
        yield
    finally:
        _log.close()
        _log = None
        _redirect([(new, old) for old, new in pairs])
        sys.stdout, sys.stderr = originals


def _redirect(pairs: Iterable[tuple[object, object]]) -> None:
    """Point handlers of the root logger from one stream to the other."""
    for handler in logging.root.handlers:
        for old, new in pairs:
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.stream = new  # setStream would flush the old one, which a full disk refuses
