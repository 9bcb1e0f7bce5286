"""JSON logs: every line of the server as one object, with the id of the request that it belongs to."""

import json
import logging
import sys
from datetime import datetime, timezone

from genai_pl.serving.errors import REQUEST
from genai_pl.serving.tracing import TRACE


class JsonFormatter(logging.Formatter):
    """Formatter of lines with the fields time, level, logger, message, request and, where there are, trace and error.

    `extra={"fields": {...}}` of a log call adds fields of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if (number := REQUEST.get(None)) is not None:
            line["request"] = number
        if (trace := TRACE.get()) is not None:
            line["trace"] = f"{trace.span.get_span_context().trace_id:032x}"
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps({**line, **getattr(record, "fields", {})})


def log_json() -> None:
    """Write all lines of this process to stderr as JSON, and a line for each request (logger genai_pl.access)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    access = logging.getLogger("genai_pl.access")
    access.setLevel(logging.INFO)
    # loggers that have handlers of their own write through the root alone
    for name in ("uvicorn", "uvicorn.error", "genai_pl.serving"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
