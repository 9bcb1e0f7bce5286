"""Limits: requests that a server refuses, times out or cancels, with a fake engine."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.serving.service import Service
from genai_pl.serving.settings import Limits, Settings, read_keys
from tests.serving.fake import FakeEngine
from tests.serving.servers import eventually, make_service, serving


@pytest.fixture(scope="module")
def service(tiny: Path) -> Service:
    return make_service(tiny, limits=Limits(queue_size=2), cache=None)


@pytest.fixture
def play(service: Service) -> "Iterator[Callable[[FakeEngine], httpx.Client]]":
    """A client of a server with the fake engine."""
    opened = []

    def start(engine: FakeEngine, **options: object) -> "httpx.Client":
        service.engine = engine
        server = serving(service, **options)
        opened.append(server)
        return server.__enter__()

    async def nothing() -> None:
        """Keep the service, which the next test uses again."""

    service.stop = nothing
    yield start
    for server in opened:
        server.__exit__(None, None, None)


PROMPT = {"prompt": "x", "max_new_tokens": 4}


def test_too_many_requests_are_told_when_to_come_again(play) -> None:
    client = play(FakeEngine(["a"], capacity=1))
    assert client.post("/generate", json=PROMPT).json()["text"] == "a"
    reply = client.post("/generate", json=PROMPT)
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "3"  # 2.5 seconds, rounded up
    assert reply.json()["error"]["type"] == "rate_limit_error"
    assert client.post("/generate", json={**PROMPT, "stream": True}).status_code == 429


def test_answers_of_one_request_wait_together_or_not_at_all(play) -> None:
    engine = FakeEngine(["a"], None, capacity=2)
    client = play(engine)
    assert client.post("/v1/completions", json={"prompt": "x", "n": 3}).status_code == 429
    assert [stream.cancelled.is_set() for stream in engine.streams] == [True, True]


@pytest.mark.parametrize(("finish_reason", "status"), [("deadline", 504), ("error", 500), ("cancelled", 503)])
def test_an_answer_that_breaks_off_is_an_error(finish_reason: str, status: int, play) -> None:
    client = play(FakeEngine(["a", "b"], finish_reason))
    reply = client.post("/generate", json=PROMPT)
    assert reply.status_code == status
    assert "a" not in reply.json()
    with client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as reply:
        assert reply.status_code == 200  # the first event is sent already
        events = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "ab"
    assert events[-1]["error"]["message"]


def test_a_stream_that_breaks_off_before_it_began_has_the_status(play) -> None:
    client = play(FakeEngine([], "deadline"))
    for path, body in (("/generate", PROMPT), ("/v1/completions", {"prompt": "x"})):
        assert client.post(path, json={**body, "stream": True}).status_code == 504


def test_the_time_of_a_request_is_the_servers_or_less(play, service: Service) -> None:
    import time

    engine = FakeEngine(["a"])
    client = play(engine)
    before = time.monotonic()
    for timeout in ({}, {"timeout": 3}, {"timeout": 1e4}):
        client.post("/generate", json={**PROMPT, **timeout})
    left = [request.deadline - before for request in engine.requests]
    assert 3 <= left[1] < 30
    assert all(service.limits.timeout <= seconds < service.limits.timeout + 30 for seconds in (left[0], left[2]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(stream: bool, play) -> None:
    engine = FakeEngine(["a"], None)
    client = play(engine)
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        body = json.dumps({**PROMPT, "stream": stream}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        assert eventually(lambda: engine.streams and engine.streams[0].n_generated)
    assert eventually(engine.streams[0].cancelled.is_set)
    assert eventually(lambda: 'genai_pl_requests_total{route="/generate",status="' in client.get("/metrics").text)


def test_a_client_that_leaves_while_it_waits_frees_its_place(play) -> None:
    engine = FakeEngine([], None)
    client = play(engine)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"prompt": "x", "stream": True}, timeout=0.3)
    assert eventually(engine.streams[0].cancelled.is_set)


def test_a_failure_of_ours_has_a_number_that_the_log_knows(play, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(["a"])
    engine.submit = lambda request: 1 / 0
    client = play(engine)
    with caplog.at_level(logging.ERROR, "genai_pl.serving"):
        reply = client.post("/generate", json=PROMPT)
    assert reply.status_code == 500
    message = reply.json()["error"]["message"]
    assert "ZeroDivision" not in reply.text
    assert "Traceback" not in reply.text
    [record] = [r for r in caplog.records if "error" in r.message]
    assert record.args[0] in message
    assert record.exc_info[0] is ZeroDivisionError


def test_keys_are_asked_for_where_there_are_some(play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# of the team\nfirst\n\nsecond\n")
    monkeypatch.setenv("GENAI_PL_API_KEYS", "third,fourth")
    keys = read_keys(str(tmp_path / "keys"))
    assert keys == ["third", "fourth", "first", "second"]
    client = play(FakeEngine(["a"]), keys=tuple(keys))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic first"},
        {"authorization": "Bearer"},
    ):
        reply = client.post("/generate", json=PROMPT, headers=headers)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models").status_code == 401
    for key in keys:
        assert client.post("/generate", json=PROMPT, headers={"authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/health", "/ready", "/metrics", "/"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize("origins", [[], ["https://example.org"]])
def test_pages_of_other_origins_may_ask_where_that_is_allowed(origins: list[str], tiny: Path) -> None:
    with serving(make_service(tiny, cors_origins=origins)) as client:
        headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
        allowed = client.options("/generate", headers=headers).headers.get("access-control-allow-origin")
        assert allowed == (origins[0] if origins else None)
        answer = client.post("/generate", json=PROMPT, headers={"origin": "https://example.org"})
        assert answer.headers.get("access-control-allow-origin") == (origins[0] if origins else None)


def test_characters_of_several_tokens_arrive_whole(tiny: Path) -> None:
    from genai_pl.serving.http.streaming import EventStream

    sent = []

    async def rest():
        yield {"text": "né 🙂 \u2028"}

    async def talk() -> None:
        async def receive() -> dict:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        await EventStream({"text": "日"}, rest())({"type": "http"}, receive, send)

    asyncio.run(talk())
    lines = b"".join(message.get("body", b"") for message in sent).decode().split("\n\n")
    assert [json.loads(line[6:])["text"] for line in lines[:2]] == ["日", "né 🙂 \u2028"]
    assert lines[2] == "data: [DONE]"


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    from genai_pl.errors import ConfigError

    wrong = {"backend": "other", "dtype": "fp8", "cache": "disk", "workers": 0, "port": 70000, "drain": 0, "slots": 0}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            Settings(**{name: value})
    with pytest.raises(ConfigError, match="url=http"):
        Settings(backend="openai")
    with pytest.raises(ConfigError, match="timeout=0"):
        Limits(timeout=0)
    whole = Settings(adapters={"a": "b"}, limits=Limits(max_n=3), generation={"temperature": 0.0})
    assert Settings.from_json(whole.to_json()) == whole
