"""Notice of a run's end: a bell on the terminal and a small JSON to a web address, whatever the end was.

The address gets one POST within a time limit. Nothing that goes wrong there changes the run: it costs one line.
"""

import json
import logging
import math
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from omegaconf import DictConfig

from genai_pl.config.redaction import redact
from genai_pl.errors import ConfigError
from genai_pl.ranks import is_first_process
from genai_pl.training.fit import final_metrics

if TYPE_CHECKING:
    from genai_pl.training.fit import Run

log = logging.getLogger(__name__)

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # states of a run that has ended


class Notice:
    """The contents of a notice of a run; `run` is set once it is built."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Run | None = None

    def contents(self, error: BaseException | None) -> dict[str, object]:
        """Run, state, steps done and asked for, last metrics (null where one is no number), the one-line error, and all of it
        in a `text`, which chat programs show.
        """
        run = self.run
        steps, of = (run.trainer.global_step, run.module.total_steps) if run else (0, None)
        logged = {} if run is None else {**run.monitor.last, **final_metrics(run)}
        metrics = {name: value if math.isfinite(value) else None for name, value in logged.items()}
        state, line = _state(error, finished=run is not None and run.finished), _line(error)
        loss = next((f", {name} {metrics[name]:.4f}" for name in ("val/loss", "train/loss") if metrics.get(name)), "")
        progress = f" at step {steps:,} of {of:,}" if of else ""
        text = f"{self.folder} {state}{progress}{loss}" + (f": {line}" if line else "")
        values = {"run": str(self.folder), "state": state, "steps": steps, "total_steps": of, "metrics": metrics}
        return {**values, "error": line, "text": text}


@contextmanager
def notifying(options: DictConfig, folder: Path) -> Iterator[Notice]:
    """Context of a run after which its end is told, on the first process; ConfigError for an address that is none.

    options: `callbacks.notify`. Errors and signals pass.
    """
    check_address(options.url)
    notice, error = Notice(folder), None
    try:
        yield notice
    except BaseException as raised:
        error = raised
        raise
    finally:
        if is_first_process():
            if options.bell and sys.__stderr__ is not None and sys.__stderr__.isatty():
                sys.__stderr__.write("\a")
                sys.__stderr__.flush()
            if options.url:
                post(options.url, notice.contents(error), timeout=options.timeout)


def check_address(url: str | None) -> None:
    """ConfigError for a text that is no address of the web."""
    if url is not None and (urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname):
        raise ConfigError(f"callbacks.notify.url={redact(url)}: expected an address, such as https://HOST/PATH")


def post(url: str, contents: Mapping[str, object], *, timeout: float) -> None:
    """Send the contents as JSON; a line in the log where that fails, or takes longer than `timeout` seconds."""
    failure: list[str] = [f"no answer within {timeout:g} s"]

    def send() -> None:
        """Replace the failure by what happened."""
        body = json.dumps(contents).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=2 * timeout):  # the end of a thread that nobody waits for
                failure.clear()
        except Exception as error:  # a library of the network raises many types; none of them is the run's
            reason = getattr(error, "reason", None) or error
            status = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
            failure[:] = [f"{status}{reason}" if str(reason) else type(error).__name__]

    # a thread: the timeout of urllib is that of each packet, and names are looked up without one
    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    thread.join(timeout)
    for reason in failure:
        # a path is often the secret of a webhook
        host = urlsplit(url).hostname
        log.warning("notify      %s was not told of the end: %s", host, redact(reason.splitlines()[0]))


def _state(error: BaseException | None, *, finished: bool) -> str:
    """How the run ended. Signals are SystemExit, Ctrl-C during a start KeyboardInterrupt."""
    if isinstance(error, Exception):
        return FAILED
    return FINISHED if error is None and finished else STOPPED


def _line(error: BaseException | None) -> str | None:
    """The error in one line without secrets; None where there is none."""
    if not isinstance(error, Exception):
        return None
    lines = str(error).strip().splitlines()
    return redact(lines[0] if lines else type(error).__name__)
