"""Server processes: one, or several workers on one port, under uvicorn.

A server with `reuse_port` takes over from another one on its port: it listens once its model is loaded, new connections are
then steered to it alone, and the old one stops when it is told to.

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
from genai_pl.serving.reuse_port import is_listening, steer_to_newest
from genai_pl.serving.settings import FOLDER, VARIABLE, Settings, share_between_processes
from genai_pl.serving.shutdown import TO_GIVE_UP

HEALTH_SECONDS = 15  # for a worker to answer the parent's ping, from a thread of its own


class Server(uvicorn.Server):
    """uvicorn's server in this process; where ports are shared, new connections go to the newest server that listens.

    greeting: lines to print once it listens
    """

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self.greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, steer and say so."""
        await super().startup(sockets)
        for listener in sockets or []:
            steer_to_newest(listener)
        print(self.greeting, flush=True)


class Supervisor(Multiprocess):
    """uvicorn's parent of several workers, which share one listening socket with it."""

    is_steered = False

    def keep_subprocess_alive(self) -> None:
        """Called twice a second: also steers once the first worker listens."""
        super().keep_subprocess_alive()
        if not self.is_steered and is_listening(self.sockets[0]):
            steer_to_newest(self.sockets[0])
            self.is_steered = True

    def terminate_all(self) -> None:
        """Close the parent's socket, to which the kernel would give connections that no worker accepts, and end the workers."""
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


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
    # uvicorn installs its own handler and raises the signal again at the end: it must not kill the process then
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = Server(uvicorn.Config(app, **options), description(backend, settings))
    try:
        server.run(sockets=[listener])
    finally:  # after Ctrl-C uvicorn raises KeyboardInterrupt here
        print(stopped(server.server_state.total_requests), flush=True)
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
    supervisor = Supervisor(config, sockets=[listener])
    supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        return 1
    print(stopped(count_requests(os.environ[FOLDER])), flush=True)
    return 0


def stopped(n: int) -> str:
    """The last line of a server."""
    return f"{'stopped':<12}after {n:,} request{'' if n == 1 else 's'}"


def count_requests(folder: str) -> int:
    """Requests that all workers have answered, by the metrics that they left in a folder."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    families = MultiProcessCollector(CollectorRegistry(), folder).collect()
    samples = (sample for family in families for sample in family.samples)
    return int(sum(sample.value for sample in samples if sample.name == "genai_pl_requests_total"))


def bind(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """An inheritable socket of the address; ConfigError if it cannot be bound.

    reuse_port: other sockets with it may be bound to the address too (SO_REUSEPORT): a new server starts while the old one still
    answers. It does not listen yet, so that no connection waits until the model is loaded; without the option it does.
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
        if not reuse_port:  # now, not in uvicorn: with SO_REUSEADDR two sockets bind to one port until one listens
            listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port={port}: another program listens there on {host}; choose another, or 0 for any"
            ) from None
        raise ConfigError(f"host={host} port={port}: {error.strerror or error}") from None
    listener.set_inheritable(True)
    return listener
