"""Restart without a gap: a new server listens beside the old one, whose streams end in their own time."""

import json
import threading
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

import httpx
import uvicorn

from genai_pl.errors import ConfigError
from genai_pl.serving.app import create_app
from genai_pl.serving.server import bind
from tests.serving.fake import FakeEngine
from tests.serving.servers import eventually, make_service


def start(checkpoint: Path, name: str, port: int) -> tuple[uvicorn.Server, threading.Thread, FakeEngine, int]:
    """A server with a fake engine on the port, 0 for any; its stream waits until it is released."""
    service = make_service(checkpoint, name=name, cache=None)
    service.engine = FakeEngine([name], None)
    listener = bind("127.0.0.1", port, reuse_port=True)
    server = uvicorn.Server(
        uvicorn.Config(create_app(service, service.settings, service.metrics), log_level="critical")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    assert eventually(lambda: server.started)
    return server, thread, service.engine, port


def test_a_stream_outlives_the_start_of_the_next_server(tiny: Path) -> None:
    old, old_thread, engine, port = start(tiny, "old", 0)
    url = f"http://127.0.0.1:{port}"
    events = []
    body = {"prompt": "x", "stream": True}
    with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        lines = (line.removeprefix("data: ") for line in reply.iter_lines() if line)
        events.append(json.loads(next(lines)))
        # the new one listens, then the old one is told to stop, and only the new one takes connections
        new, new_thread, _, _ = start(tiny, "new", port)
        old.should_exit = True
        assert eventually(lambda: all(not server.is_serving() for server in old.servers))
        names = {httpx.get(f"{url}/v1/models").json()["data"][0]["id"] for _ in range(20)}
        assert names == {"new"}
        assert old_thread.is_alive()
        # the stream goes on, to its end
        engine.streams[0].released.set()
        rest = list(lines)
    assert rest[-1] == "[DONE]"
    events += map(json.loads, rest[:-1])
    assert "".join(event["choices"][0]["text"] for event in events) == "old!"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    new.should_exit = True
    for thread in (old_thread, new_thread):
        thread.join(30)
        assert not thread.is_alive()


def test_without_the_option_a_taken_port_is_refused() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="another program listens"):
        bind("127.0.0.1", listener.getsockname()[1], reuse_port=True)
