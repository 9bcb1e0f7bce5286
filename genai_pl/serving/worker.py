"""Worker: builds the application of one server process, and prints what it serves.

`create` is the factory that uvicorn's workers and gunicorn call by name: it reads the settings from the environment.
"""

import gc
import os
import signal
import sys
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from genai_pl.config.redaction import redact
from genai_pl.errors import ConfigError, UserError
from genai_pl.plugins import import_plugins
from genai_pl.serving.app import create_app
from genai_pl.serving.http.upstream import Upstream
from genai_pl.serving.json_logs import log_json
from genai_pl.serving.log_limits import limit_repeated_lines
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.service import Service, open_service
from genai_pl.serving.settings import FOLDER, VARIABLE, Settings, read_admin_keys, read_keys
from genai_pl.serving.tracing import open_tracing
from genai_pl.signals import when_parent_ends


def build(settings: Settings) -> tuple[Service | Upstream, FastAPI]:
    """(service or upstream, application) of the settings: loads the model, which takes seconds to minutes."""
    limit_repeated_lines()
    if settings.log_format == "json":
        log_json()
    metrics = Metrics()
    keys = read_keys(settings.api_keys)
    admin_keys = read_admin_keys(settings, keys)
    tracing = open_tracing(settings.otlp_endpoint)
    backend = Upstream(settings, metrics) if settings.backend == "openai" else open_service(settings, metrics)
    gc.collect()
    gc.freeze()  # model and libraries stay: without this each full collection scans them for up to a second
    return backend, create_app(backend, settings, metrics, keys, admin_keys, tracing)


def create() -> FastAPI:
    """The application of one of several workers; a user's mistake is printed as one line and ends the server."""
    try:
        if VARIABLE not in os.environ:
            raise ConfigError(f"{VARIABLE} is not set: start with serve.py, or with deploy/gunicorn.conf.py")
        import_plugins()
        settings = Settings.from_json(os.environ[VARIABLE])
        when_parent_ends(partial(os.kill, os.getpid(), signal.SIGTERM))  # or it would serve on, and hold the port
        backend, app = build(settings)
    except UserError as error:
        if first_to("fail"):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(STARTUP_FAILURE)  # tells the parent not to restart workers: another start would fail too
    if first_to("describe"):
        print(description(backend, settings), flush=True)
    return app


def first_to(what: str) -> bool:
    """True in the first worker of a server that asks for this event, so that a line is printed once; always if alone."""
    if FOLDER not in os.environ:
        return True
    try:
        (Path(os.environ[FOLDER]) / f".{what}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def description(backend: Service | Upstream, settings: Settings) -> str:
    """Lines to print at the start: address, model, slots, cache, keys, and a command to try."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"http://{'localhost' if settings.host in ('0.0.0.0', '::') else host}:{settings.port}"
    lines = {"address": f"{address}  (a page to chat; {address}/docs describes the API)"}
    if isinstance(backend, Upstream):
        lines["serving"] = f"what {redact(settings.url)} serves"
    else:
        kind = "a reward model" if backend.is_reward else "a language model" if backend.engine else "an encoder"
        lines["serving"] = f"{backend.name}, {kind}"
        lines["context"] = f"{backend.context:,} tokens"
        if backend.engine is not None:
            lines["slots"] = f"{settings.slots} answers at once, {settings.limits.queue_size} may wait"
        lines["adapters"] = ", ".join(settings.adapters) or "none"
        if settings.adapters_root is not None:
            lines["adapters"] += f"; more from {settings.adapters_root} by POST /admin/adapters"
    # in front of either
    lines["workers"] = f"{settings.workers}"
    lines["cache"] = redact(settings.cache or "none")
    if settings.otlp_endpoint is not None:
        lines["traces"] = f"to {redact(settings.otlp_endpoint)}"
    asks = bool(read_keys(settings.api_keys))
    lines["keys"] = "asked for" if asks else "none asked for"
    lines["try"] = curl(backend, address, asks_for_key=asks)
    return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


def curl(backend: Service | Upstream, address: str, *, asks_for_key: bool) -> str:
    """A curl command that this server answers, with a place for the key."""
    if isinstance(backend, Upstream) or backend.engine is not None:
        path, body = "/generate", '{"prompt": "Once upon a time", "max_new_tokens": 20}'
    elif backend.is_reward:
        path, body = "/score", '{"text": "Once upon a time"}'
    elif backend.labels is not None and len(backend.labels.names) == 1:
        path, body = "/rerank", '{"query": "tea", "documents": ["a hot drink", "a cold stone"]}'
    elif backend.labels is not None:
        path, body = "/classify", '{"input": "Once upon a time"}'
    else:
        path, body = "/v1/embeddings", '{"input": "Once upon a time"}'
    key = "-H 'Authorization: Bearer KEY' " if asks_for_key else ""
    return f"curl {address}{path} {key}-H 'Content-Type: application/json' -d '{body}'"
