"""Servers for tests, on free ports, in front of tiny random models."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import uvicorn
from fastapi import FastAPI

from genai_pl.data import byte_tokenizer
from genai_pl.data.prompt_tokens import ensure_template
from genai_pl.exporting import export_model
from genai_pl.models import ModelConfig, build_model
from genai_pl.serving.app import create_app
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.server import bind
from genai_pl.serving.service import Service, open_service
from genai_pl.serving.settings import Settings

GREEDY = {"temperature": 0.0, "max_new_tokens": 16}


def write_model(folder: Path, *, template: bool = True, **options: object) -> Path:
    """The folder, with a random model of the given shape and a byte tokenizer in it."""
    tokenizer = byte_tokenizer()
    if template:
        ensure_template(tokenizer)
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": len(tokenizer), "max_seq_len": 128, "init_std": 0.2}
    export_model(build_model(ModelConfig(**{**sizes, **options})), tokenizer, folder, card={})
    return folder


@contextmanager
def running(app: FastAPI, **options: object) -> Iterator[str]:
    """Context with the URL of a server that runs the application in a thread."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()


def eventually(holds: Callable[[], object], *, seconds: float = 20.0) -> bool:
    """True once the condition holds; False if it does not within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.005)
    return False


def make_service(checkpoint: Path, **options: object) -> Service:
    """The service of a model, greedy by default."""
    settings = Settings(checkpoint=str(checkpoint), **{"generation": GREEDY, **options})
    return open_service(settings, Metrics())


@contextmanager
def serving(
    service: Service, *, keys: tuple[str, ...] = (), admin_keys: tuple[str, ...] = ()
) -> Iterator[httpx.Client]:
    """Context with an HTTP client of a server in front of the service."""
    app = create_app(service, service.settings, service.metrics, keys, admin_keys)
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
