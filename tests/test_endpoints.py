"""Requests to servers that stumble, refuse, are elsewhere or are no servers: asked again, or one line that names the option."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

from genai_pl.endpoints import Endpoint
from genai_pl.errors import ConfigError


class Answer(NamedTuple):
    """How a server answers: a status and a body, of which `missing` bytes are never sent; status 0: it hangs up."""

    status: int = 200
    body: bytes = b'{"answer": 1}'
    headers: tuple[tuple[str, str], ...] = ()
    missing: int = 0


@contextmanager
def answering(*answers: Answer) -> Iterator[tuple[str, list[str]]]:
    """Context with the address of a server that answers so, the last way again and again, and the bodies that it got."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
            status, body, headers, missing = answers[min(len(asked), len(answers)) - 1]
            if not status:
                return
            self.send_response(status)
            for name, value in (*headers, ("Content-Length", f"{len(body) + missing}")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited between attempts, which take none here."""
    found: list[float] = []
    monkeypatch.setattr("genai_pl.endpoints.time.sleep", found.append)
    return found


PASSING = (
    Answer(500), Answer(429, headers=(("Retry-After", "7"),)), Answer(0), Answer(missing=5), Answer(body=b"<html>"),
    Answer(body=b"[1]"), Answer(body=b"[" * 100_000), Answer(503, headers=(("Retry-After", "9999"),)),
    Answer(502, b'{"error": null}', (("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT"),)), Answer(408, b"[" * 9_999), Answer(),
)  # fmt: skip


def test_failures_that_pass_are_asked_again(waits: list[float]) -> None:
    with answering(*PASSING) as (url, asked):
        endpoint = Endpoint(url, "teacher", retries=len(PASSING) - 1)
        assert endpoint.ask("completions", {"prompt": "é"}) == {"answer": 1}
    assert [json.loads(body) for body in asked] == [{"prompt": "é"}] * len(PASSING)
    assert waits == [1, 7, 4, 8, 16, 30, 30, 300, 30, 30]


@pytest.mark.parametrize(
    ("answer", "path", "message"),
    [
        (Answer(400, b'{"error": {"message": "too\\nlong"}}'), "/v1", "no answer (400 Bad Request: too long)"),
        (Answer(401, b'{"error": "who are you"}'), "/v1", "no answer (401 Unauthorized: who are you)"),
        (Answer(404, b"null"), "/v1", "no answer (404 Not Found)"),
        (Answer(404, b'{"detail": "Not Found"}'), "", "no answer (404 Not Found: the address ends in /v1)"),
        (Answer(308, headers=(("Location", "http://other/v1"),)), "/v1", "(308 Permanent Redirect: it is at http://other/v1)"),
        (Answer(302, b""), "/v1", "(302 Found: it is at another address)"),
    ],
)  # fmt: skip
def test_refusals_are_one_line_at_once(answer: Answer, path: str, message: str, waits: list[float]) -> None:
    with answering(answer) as (url, asked), pytest.raises(ConfigError) as raised:
        Endpoint(url.removesuffix("/v1") + path, "teacher", retries=3).ask("completions", {})
    assert message in str(raised.value)
    assert str(raised.value).startswith("teacher=http://127.0.0.1:")
    assert (len(asked), waits, "\n" in str(raised.value)) == (1, [], False)


def test_a_server_that_is_not_there_is_one_line_after_all_attempts(waits: list[float]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        with pytest.raises(ConfigError, match=r"^teacher=http://.*: no answer \(.*refused\)$"):
            Endpoint(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", "teacher", retries=2).ask("models")
    assert waits == [1, 2]


def test_the_time_limit_is_of_the_whole_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                try:
                    while True:
                        connection.sendall(b" ")
                        pause.wait(0.02)
                except OSError:  # the client has gone
                    return

        pause = threading.Event()
        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(ConfigError, match=r"no answer \(timed out\)"):
            Endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "teacher", timeout=0.2).ask("models")
        thread.join()


@pytest.mark.parametrize(
    "url", ["http://[::1/v1", "http://host:port/v1", "http:///v1", "http://a b/v1", "http://127.0.0.1:99999"]
)
def test_what_is_no_address_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Endpoint(url, "teacher").ask("models")
    assert str(raised.value).startswith(f"teacher={url}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("key", ["sec\nret", "sécret", "sec\x00ret"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="its key has characters that no header may have") as raised:
        Endpoint("http://127.0.0.1:1/v1", "teacher", key).ask("models")
    assert key not in str(raised.value)


def test_a_line_break_behind_a_key_is_not_sent() -> None:
    with answering(Answer()) as (url, _):
        assert Endpoint(url, "teacher", "secret\n").ask("models") == {"answer": 1}
