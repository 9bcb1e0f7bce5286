"""Restart without a gap: a new server listens beside the old one, whose streams end in their own time."""

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

import httpx
import uvicorn

from genai_pl.errors import ConfigError
from genai_pl.serving.app import create_app
from genai_pl.serving.connections import connection_options
from genai_pl.serving.reuse_port import is_listening, steer_to_newest
from genai_pl.serving.server import bind
from tests.conftest import ROOT
from tests.serving.fake import FakeEngine
from tests.serving.servers import eventually, make_service, write_model
from tests.serving.test_serve_command import Server


def start(checkpoint: Path, name: str, port: int) -> tuple[uvicorn.Server, threading.Thread, FakeEngine, int]:
    """A server with a fake engine on the port, 0 for any; its stream waits until it is released."""
    service = make_service(checkpoint, name=name, cache=None)
    service.engine = FakeEngine([name], None)
    listener = bind("127.0.0.1", port, reuse_port=True)
    app = create_app(service, service.settings, service.metrics)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", **connection_options()))
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


class Client(threading.Thread):
    """Streams one answer after another until it is told to end, each on a connection of its own, or all on one where it keeps it.

    seen: (name of the server, when the stream began, when it ended) of each; wrong: what differs from the text, or failed
    """

    def __init__(self, url: str, prompt: str, text: str, *, keeps: bool) -> None:
        super().__init__(daemon=True)
        self.url, self.prompt, self.text = url, prompt, text
        self.connection = httpx.Client() if keeps else None
        self.seen: list[tuple[str, float, float]] = []
        self.wrong: list[object] = []
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.is_set():
            began = time.monotonic()
            try:
                name, text = streamed(self.url, self.prompt, self.connection)
            except Exception as error:
                self.wrong.append(error)
                continue
            self.seen.append((name, began, time.monotonic()))
            if text != self.text:
                self.wrong.append((name, text))


def served_name(url: str) -> str:
    """The name of the server that takes the next connection."""
    return httpx.get(f"{url}/v1/models").json()["data"][0]["id"]


def streamed(url: str, prompt: str, connection: httpx.Client | None = None) -> tuple[str, str]:
    """(name of the server, text) of a greedy stream, on a new connection or on this one."""
    body = {"prompt": prompt, "max_tokens": 400, "temperature": 0, "stream": True, "logit_bias": {"256": -100}}
    stream = httpx.stream if connection is None else connection.stream
    with stream("POST", f"{url}/v1/completions", json=body, timeout=60) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    events = [json.loads(line) for line in lines[:-1]]
    assert not any("error" in event for event in events), events[-1]
    return events[0]["model"], "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_no_stream_is_lost_when_a_new_process_takes_over(workers: int, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", max_seq_len=512)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["reuse_port=true", f"port={port}", f"workers={workers}", "cache=null", "slots=4", "prefix_cache_mib=0"]
    command = [sys.executable, str(ROOT / "serve.py"), f"checkpoint={model}", *options]
    servers = [Server([*command, "name=old"], tmp_path / "old.txt")]
    clients: list[Client] = []
    try:
        servers[0].wait_for(url, 240)
        prompts = ["Once", "upon", "a time", "there", "was", "a king"]
        texts = [streamed(url, prompt)[1] for prompt in prompts]
        # those that keep their connections stay with the old one until it is told to stop
        clients = [Client(url, *pair, keeps=n % 2 == 0) for n, pair in enumerate(zip(prompts, texts, strict=True))]
        for client in clients:
            client.start()
        # the new one starts while streams run; from the moment that it listens it gets every new one
        servers.append(Server([*command, "name=new"], tmp_path / "new.txt"))
        assert eventually(lambda: served_name(url) == "new", seconds=240)
        told = time.monotonic()
        assert servers[0].stop() == 0
        ended = time.monotonic()
        time.sleep(1.0)
        for client in clients:
            client.is_over.set()
            client.join(60)
            if client.connection is not None:
                client.connection.close()
        assert [client.wrong for client in clients] == [[]] * len(clients)
        seen = [each for client in clients for each in client.seen]
        assert {name for name, *_ in seen} == {"old", "new"}
        # streams of the old one that ran when it was told to stop have ended in their own time
        assert any(name == "old" and began < told < end for name, began, end in seen)
        assert all(name == "new" for name, began, _ in seen if began > ended)
        assert servers[1].stop() == 0
    finally:
        for client in clients:
            client.is_over.set()
        for server in servers:
            with suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def test_new_connections_go_to_the_newest_of_two_servers() -> None:
    """So the kernel's documentation of SO_ATTACH_REUSEPORT_CBPF, over three servers, of which each replaces the one before."""
    listeners = [bind("127.0.0.1", 0, reuse_port=True)]
    address = listeners[0].getsockname()
    try:
        assert not is_listening(listeners[0])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        for _ in range(3):
            listeners[-1].listen()
            if not steer_to_newest(listeners[-1]):
                pytest.skip("this system cannot steer connections")
            with ExitStack() as connections:
                for _ in range(8):
                    connections.enter_context(socket.create_connection(address, timeout=5))
                counts = [n_accepted(listener) for listener in listeners]
            assert counts == [0] * (len(listeners) - 1) + [8]
            for old in listeners[:-1]:
                old.close()
            listeners = [listeners[-1], bind(*address, reuse_port=True)]
    finally:
        for listener in listeners:
            listener.close()
    with bind("127.0.0.1", 0) as alone:
        assert is_listening(alone)
        assert not steer_to_newest(alone)


def n_accepted(listener: socket.socket) -> int:
    """How many connections wait at a socket; they are accepted and closed."""
    listener.setblocking(False)
    for n in count():
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return n
    raise AssertionError


def test_a_request_on_its_way_at_the_signal_is_answered(tiny: Path) -> None:
    server, thread, _, port = start(tiny, "old", 0)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as idle:
        assert eventually(lambda: server.server_state.connections)
        server.should_exit = True
        assert eventually(lambda: not any(one.is_serving() for one in server.servers))
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        content = b""
        while part := idle.recv(65536):
            content += part
    assert content.startswith(b"HTTP/1.1 200")
    assert b'{"status":"ok"}' in content
    thread.join(30)
    assert not thread.is_alive()


def test_a_request_after_a_stream_that_ran_at_the_signal_is_answered(tiny: Path) -> None:
    server, thread, engine, port = start(tiny, "old", 0)
    body = b'{"prompt": "x", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as kept:
        kept.sendall(head % len(body) + body)
        content = kept.recv(65536)  # the head, which keeps the connection
        server.should_exit = True
        assert eventually(lambda: not any(one.is_serving() for one in server.servers))
        engine.streams[0].released.set()
        while not content.endswith(b"0\r\n\r\n"):
            content += kept.recv(65536)
        assert b"connection: close" not in content.lower()
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = b""
        while part := kept.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()
    thread.join(30)
    assert not thread.is_alive()


def test_an_answer_that_begins_after_the_signal_says_that_it_is_the_last(tiny: Path) -> None:
    server, thread, engine, port = start(tiny, "old", 0)
    replies: list[httpx.Response] = []

    def ask() -> None:
        replies.append(httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "x"}, timeout=60))

    client = threading.Thread(target=ask)
    client.start()
    assert eventually(lambda: engine.streams)
    server.should_exit = True
    assert eventually(lambda: not any(one.is_serving() for one in server.servers))
    engine.streams[0].released.set()
    client.join(30)
    thread.join(30)
    assert (replies[0].status_code, replies[0].headers["connection"]) == (200, "close")


def test_without_the_option_a_taken_port_is_refused() -> None:
    with bind("127.0.0.1", 0) as listener, pytest.raises(ConfigError, match="another program listens"):
        bind("127.0.0.1", listener.getsockname()[1], reuse_port=True)
