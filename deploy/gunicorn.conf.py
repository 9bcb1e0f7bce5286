"""gunicorn -c deploy/gunicorn.conf.py, with CHECKPOINT=MODEL or all settings as JSON in GENAI_PL_SERVE (docs/serving.md)."""

import json
import os

from uvicorn_worker import UvicornWorker

from genai_pl.serving.server import server_options
from genai_pl.serving.settings import VARIABLE, Settings, share_between_processes

if VARIABLE not in os.environ:
    os.environ[VARIABLE] = json.dumps({"checkpoint": os.environ.get("CHECKPOINT", "auto")})
settings = Settings.from_json(os.environ[VARIABLE])
share_between_processes()  # before a worker imports prometheus_client


class Worker(UvicornWorker):
    """A worker with the limits of serve.py for connections and for the time to stop."""

    CONFIG_KWARGS = {**UvicornWorker.CONFIG_KWARGS, **server_options(settings)}


bind = f"{settings.host}:{settings.port}"
workers = settings.workers
worker_class = Worker
wsgi_app = "genai_pl.serving.worker:create()"
timeout = 300  # seconds without a sign of life: loading a large model is one long silence
graceful_timeout = round(settings.drain) + 5
keepalive = 75


def child_exit(server: object, worker: object) -> None:
    """What lives only with a worker leaves the sums with it."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(worker.pid)
