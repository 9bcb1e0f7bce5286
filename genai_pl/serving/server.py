"""One process that serves, or several on one port."""

import errno
import os
import socket

import uvicorn
from uvicorn.supervisors import Multiprocess

from genai_pl.errors import ConfigError
from genai_pl.serving.metrics import share_between_processes
from genai_pl.serving.settings import VARIABLE, Settings

HEALTH_SECONDS = 60  # for a worker to say that it lives: loading a large model holds it up


def serve(settings: Settings) -> int:
    """Serve until a signal, then finish what runs; exit status 0."""
    listener = bind(settings.host, settings.port)
    port = listener.getsockname()[1]
    options = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": max(1, round(settings.drain)),
    }
    if settings.workers == 1:
        from genai_pl.serving.worker import build, description

        behind, app = build(settings)
        print(description(behind, settings, port), flush=True)
        uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])
        return 0
    return _serve_several(settings, listener, port, options)


def _serve_several(settings: Settings, listener: socket.socket, port: int, options: dict[str, object]) -> int:
    from dataclasses import replace

    share_between_processes()
    os.environ[VARIABLE] = replace(settings, port=port).to_json()
    config = uvicorn.Config(
        "genai_pl.serving.worker:create",
        factory=True,
        workers=settings.workers,
        timeout_worker_healthcheck=HEALTH_SECONDS,
        **options,
    )
    supervisor = Multiprocess(config, sockets=[listener])
    supervisor.run()
    return 1 if any(process.exitcode not in (0, None) for process in supervisor.processes) else 0


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, not yet listening; ConfigError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # two sockets may be bound to one port until one listens
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port={port}: another program listens there on {host}; choose another, or 0 for any"
            ) from None
        raise ConfigError(f"host={host} port={port}: {error.strerror or error}") from None
    listener.set_inheritable(True)
    return listener
