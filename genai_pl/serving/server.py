"""Server processes: one, or several workers on one port, under uvicorn.

One worker runs in this process. Several are uvicorn's Multiprocess: the parent binds the socket, starts the workers, restarts
one that dies and passes signals on; the kernel hands each connection to a worker.
"""

import errno
import math
import os
import signal
import socket
from dataclasses import replace

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from genai_pl.errors import ConfigError
from genai_pl.serving.connections import connection_options
from genai_pl.serving.settings import VARIABLE, Settings, share_between_processes
from genai_pl.serving.shutdown import TO_GIVE_UP

HEALTH_SECONDS = 15  # for a worker to answer the parent's ping, from a thread of its own


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit status; 0, or 1 if no worker could load the model.

    With port=0 the system chooses a port, which the settings of the workers and the printed address have.
    """
    options = {"log_level": "warning", "access_log": False, **server_options(settings)}
    with bind(settings.host, settings.port, reuse_port=settings.reuse_port) as listener:
        settings = replace(settings, port=listener.getsockname()[1])
        return (_serve_alone if settings.workers == 1 else _serve_together)(settings, listener, options)


def server_options(settings: Settings) -> dict[str, object]:
    """uvicorn options that `serve` and deploy/gunicorn.conf.py share.

    The graceful timeout is longer than the drain, so that requests end with 503 before their connections are cut.
    """
    seconds = math.ceil(settings.drain + TO_GIVE_UP)
    logs = {"log_config": None} if settings.log_format == "json" else {}  # else uvicorn writes its lines as text
    return {"server_header": False, "timeout_graceful_shutdown": seconds, **logs, **connection_options()}


def _serve_alone(settings: Settings, listener: socket.socket, options: dict[str, object]) -> int:
    from genai_pl.serving.worker import build, description

    backend, app = build(settings)
    print(description(backend, settings), flush=True)
    # uvicorn installs its own handler and raises the signal again at the end: it must not kill the process then
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])
    return 0


def _serve_together(settings: Settings, listener: socket.socket, options: dict[str, object]) -> int:
    """Workers read their settings from the environment; the first one prints what is served."""
    share_between_processes()
    os.environ[VARIABLE] = settings.to_json()
    config = uvicorn.Config(
        "genai_pl.serving.worker:create",
        factory=True,
        workers=settings.workers,
        timeout_worker_healthcheck=HEALTH_SECONDS,
        **options,
    )
    supervisor = Multiprocess(config, sockets=[listener])
    supervisor.run()
    return 1 if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes) else 0


def bind(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """A listening, inheritable socket of the address; ConfigError if it cannot be bound.

    reuse_port: other sockets with it may listen there too, and the kernel distributes connections (SO_REUSEPORT): a new server
    starts while the old one still answers.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        if not hasattr(socket, "SO_REUSEPORT"):
            raise ConfigError("reuse_port=true: this system cannot share a port between servers")
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # now, not in uvicorn: with SO_REUSEADDR two sockets bind to one port until one listens
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port={port}: another program listens there on {host}; choose another, or 0 for any"
            ) from None
        raise ConfigError(f"host={host} port={port}: {error.strerror or error}") from None
    listener.set_inheritable(True)
    return listener
