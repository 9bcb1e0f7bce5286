"""Connections of slow and idle clients: the server closes each after its deadline, and others are answered meanwhile."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.serving import connections
from genai_pl.serving.app import create_app
from genai_pl.serving.connections import Connection, connection_limits, connection_options
from genai_pl.serving.http import bodies
from genai_pl.serving.log_limits import RepeatFilter
from genai_pl.serving.settings import Limits
from tests.conftest import some
from tests.serving.fake import FakeEngine
from tests.serving.probe import Probed
from tests.serving.servers import eventually, make_service, running

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
SOON = 0.3


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short deadlines, so that the tests are fast."""
    for name in ("HEAD_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(connections, name, SOON)
    monkeypatch.setattr(bodies, "SECONDS", SOON)


@contextmanager
def server(tiny: Path, engine: FakeEngine | None = None, **options: object) -> "Iterator[tuple[httpx.Client, Probed]]":
    service = make_service(tiny, cache=None)
    service.engine = engine or FakeEngine(["a"])
    probed = Probed(create_app(service, service.settings, service.metrics))
    with (
        running(probed, **{**connection_options(), **options}) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client, probed


def connect(client: "httpx.Client") -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def rest(raw: socket.socket) -> bytes:
    """The bytes until the server closes the connection; fails after 20 seconds."""
    received = bytearray()
    try:
        while part := raw.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return bytes(received)


UNDONE = {
    "nothing": b"",
    "a part of the head": HEAD,
    "a letter": b"P",
    "no body": HEAD + b"Content-Length: 5\r\n\r\n",
    "half a body": HEAD + b"Content-Length: 5\r\n\r\n{",
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    "a second head after an answer": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health",
}


@pytest.mark.parametrize("case", UNDONE)
def test_what_is_left_undone_is_waited_for_only_so_long(case: str, tiny: Path) -> None:
    with server(tiny, timeout_keep_alive=1) as (client, _), connect(client) as raw:
        raw.sendall(UNDONE[case])
        received = rest(raw)
    assert received == b"" or received.startswith((b"HTTP/1.1 408", b"HTTP/1.1 200"))


@pytest.mark.parametrize(
    "head", [HEAD, HEAD + b"Content-Length: 99\r\n\r\n", HEAD + b"Content-Length: 99999999\r\n\r\n"]
)
def test_a_byte_now_and_then_does_not_keep_a_connection_open(head: bytes, tiny: Path) -> None:
    with server(tiny) as (client, _), connect(client) as raw:
        raw.sendall(head)
        is_over = threading.Event()

        def drip() -> None:
            while not is_over.wait(0.02):
                try:
                    raw.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        rest(raw)
        is_over.set()
        thread.join(20)


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
STRANGE = {
    "a body that is never continued": (HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n", (b"100", b"408")),
    "an expectation that nobody knows": (HEALTH + b"Expect: more\r\n\r\n", (b"200", b"417")),
    "another protocol": (HEALTH + b"Upgrade: websocket\r\nSec-WebSocket-Key: \xff\r\n\r\n", (b"200", b"400", b"426")),
    "a protocol and a body": (HEAD + b"Connection: upgrade\r\nUpgrade: h2c, x\r\nContent-Length: 9\r\n\r\n", (b"408",)),
    "a thousand headers": (HEALTH + b"X: y\r\n" * 1000 + b"\r\n", (b"200", b"400", b"431")),
    "a hundred thousand headers": (HEALTH + b"X: y\r\n" * 100_000 + b"\r\n", (b"400", b"431")),
    "a header without an end": (HEALTH + b"X: " + b"y" * 500_000, (b"400", b"431")),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}", (b"400",)),
    "a length below none": (HEAD + b"Content-Length: -5\r\n\r\n{}", (b"400",)),
    "a chunk without an end": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 100_000, (b"400", b"408")),
}


@pytest.mark.parametrize("case", some(STRANGE))
def test_what_is_strange_in_a_head_is_refused_and_keeps_nobody_waiting(case: str, tiny: Path) -> None:
    data, statuses = STRANGE[case]
    with server(tiny) as (client, probed), connect(client) as raw:
        probed.reset()
        with suppress(OSError):  # the server may have closed it before all is sent
            raw.sendall(data)
        received = rest(raw)
        assert client.get("/health").status_code == 200
        assert probed.busy < 1
    assert received == b"" or received.removeprefix(b"HTTP/1.1 ").startswith(statuses), received[:200]
    assert b"HTTP/1.1 5" not in received


def test_idle_connections_cost_others_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 30.0)
    with server(tiny, timeout_keep_alive=30) as (client, _), ExitStack() as stack:
        idle = [stack.enter_context(connect(client)) for _ in range(100)]
        for raw in idle:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert raw.recv(20).startswith(b"HTTP/1.1 200")
        assert client.post("/generate", json={"prompt": "x"}).status_code == 200


def test_a_client_that_does_not_read_a_large_answer_is_left(tiny: Path) -> None:
    service = make_service(tiny, cache=None, limits=Limits(max_tokens=4096))
    service.engine = FakeEngine(["x" * 1000] * 20_000)
    app = create_app(service, service.settings, service.metrics)
    with running(app, **connection_options()) as url, httpx.Client(base_url=url, timeout=30) as client:
        with connect(client) as raw:
            body = b'{"prompt": "x", "max_tokens": 4000}'
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.sendall(
                HEAD.replace(b"/generate", b"/v1/completions") + b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            assert raw.recv(15).startswith(b"HTTP/1.1 200")
            assert eventually(lambda: _is_closed(raw))
        assert client.get("/health").status_code == 200


def _is_closed(raw: socket.socket) -> bool:
    """True if the server has closed a connection whose answer nobody reads."""
    try:
        raw.send(b"x")
    except OSError:
        return True
    return False


def test_a_client_that_does_not_read_its_answer_is_left(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((connections, "HEAD_SECONDS"), (bodies, "SECONDS")):
        monkeypatch.setattr(module, name, 30.0)
    engine = FakeEngine(["x" * 1000] * 20_000, None)
    with server(tiny, engine) as (client, _), connect(client) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = b'{"prompt": "x", "stream": true}'
        raw.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: engine.streams and engine.streams[0].cancelled.is_set())


def test_a_client_that_leaves_is_noticed_even_where_it_has_asked_for_more(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((connections, "HEAD_SECONDS"), (bodies, "SECONDS")):
        monkeypatch.setattr(module, name, 30.0)
    engine = FakeEngine(["a"], None)
    with server(tiny, engine) as (client, _):
        with connect(client) as raw:
            body = b'{"prompt": "x"}'
            request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
            raw.sendall(request)
            assert eventually(lambda: engine.streams and engine.streams[0].n_generated)
            raw.sendall(request * 3)
        assert eventually(engine.streams[0].cancelled.is_set)


def test_requests_that_are_sent_ahead_are_all_answered(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((connections, "HEAD_SECONDS"), (bodies, "SECONDS")):
        monkeypatch.setattr(module, name, 30.0)
    with server(tiny) as (client, _), connect(client) as raw:
        body = b'{"prompt": "x"}'
        raw.sendall((HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 50)
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = rest(raw)
    assert received.count(b"HTTP/1.1 200 OK") == 51
    assert b"HTTP/1.1 4" not in received


def test_a_body_in_chunks_of_one_byte_is_read_and_keeps_the_event_loop_free(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "SECONDS", 30.0)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 30.0)
    body = json.dumps({"prompt": "x" * 50_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    with server(tiny) as (client, probed), connect(client) as raw:
        probed.reset()
        raw.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        assert b"the prompt has 50,000 characters" in rest(raw)
        assert probed.busy < 1.0


def test_half_open_connections_make_room_for_requests(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((connections, "HEAD_SECONDS"), (bodies, "SECONDS")):
        monkeypatch.setattr(module, name, 600.0)
    monkeypatch.setattr(connections, "connection_limits", lambda n: (8, 8))
    engine = FakeEngine(["a"], None)
    with server(tiny, engine, timeout_keep_alive=600) as (client, _), ExitStack() as stack:
        patient = stack.enter_context(connect(client))  # its answer takes its time
        body = b'{"prompt": "x"}'
        patient.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert eventually(lambda: engine.streams and engine.streams[0].n_generated)
        half = [stack.enter_context(connect(client)) for _ in range(40)]
        for raw in half:
            raw.sendall(HEAD)
        for _ in range(5):
            assert httpx.get(f"{client.base_url}/health", timeout=20).status_code == 200
        assert rest(half[0]) == b""  # the first one had to go
        engine.streams[0].released.set()
        assert b'"a!"' in rest(patient)


def test_there_are_never_more_connections_than_descriptors() -> None:
    for n in (128, 256, 1024, 4096, 65_536, 2**20):
        most, at_once = connection_limits(n)
        assert 8 <= most <= n - 4 * at_once - 20
        assert at_once >= 8
    assert connection_limits(2**20)[0] == connections.MAX_CONNECTIONS


@pytest.mark.slow
def test_a_server_of_few_descriptors_answers_beside_many_half_open_connections(tiny: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    from tests.conftest import ROOT
    from tests.serving.test_serve_command import free_port, is_ready

    port, log = free_port(), tmp_path / "log.txt"
    command = f"ulimit -n 128; exec {sys.executable} {ROOT / 'serve.py'} checkpoint={tiny} port={port}"
    with log.open("w") as file:
        process = subprocess.Popen(["bash", "-c", command], cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: is_ready(url), seconds=90), log.read_text()
        with ExitStack() as stack:
            for _ in range(190):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)).sendall(HEAD)
            began = time.monotonic()
            for _ in range(20):
                reply = httpx.post(f"{url}/generate", json={"prompt": "x", "max_new_tokens": 2}, timeout=20)
                assert reply.status_code == 200
            assert time.monotonic() - began < 20
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert log.stat().st_size < 10_000, log.read_text()[:2000]


def record(message: str, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, None) if error else None
    return logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, message, arguments, info)


def test_a_line_that_is_repeated_is_said_once_a_minute() -> None:
    clock = [0.0]
    quiet = RepeatFilter(now=lambda: clock[0])
    assert [quiet.filter(record("Invalid HTTP request received.")) for _ in range(3)] == [True, False, False]
    assert quiet.filter(record("request %s: 504", "a"))
    assert quiet.filter(record("request %s: 504", "b"))  # each request has its line
    assert quiet.filter(record("an answer ends", error=ValueError("1")))
    assert quiet.filter(record("an answer ends", error=ValueError("2")))
    clock[0] = 61.0
    again = record("Invalid HTTP request received.")
    assert quiet.filter(again)
    assert again.getMessage() == "Invalid HTTP request received. (and 2 times more)"


def test_every_way_to_start_a_server_has_these_connections() -> None:
    import runpy

    from genai_pl.serving.server import server_options
    from genai_pl.serving.settings import Settings
    from tests.conftest import ROOT

    assert server_options(Settings())["http"] is Connection
    pytest.importorskip("uvicorn_worker", reason="needs pip install gunicorn uvicorn-worker")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GENAI_PL_SERVE", "GENAI_PL_CACHE_KEY"):
            patch.setenv(name, "{}")
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", "anywhere")
        worker = runpy.run_path(str(ROOT / "deploy" / "gunicorn.conf.py"))["worker_class"]
    assert worker.CONFIG_KWARGS["http"] is Connection
    assert worker.CONFIG_KWARGS["timeout_graceful_shutdown"] == 32
