"""Secrets: passwords of cache and upstream server, and reasons of failures, reach neither clients nor logs in clear."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
import logging
import os
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
pytest.importorskip("redis", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.errors import ConfigError
from genai_pl.serving.http.upstream import Upstream
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.response_cache import make_cache
from genai_pl.serving.server import bind
from genai_pl.serving.settings import Settings
from genai_pl.serving.worker import description
from tests.serving.fake import FakeEngine
from tests.serving.servers import make_service, serving
from tests.serving.test_proxy import ASKED, proxy

SECRET = "hunter2"
CACHE = f"redis://:{SECRET}@127.0.0.1:1/0"


def test_what_a_server_says_of_itself_has_no_password(tiny: Path) -> None:
    service = make_service(tiny, cache=CACHE)
    text = description(service, service.settings) + repr(service.settings)
    proxied = Settings(backend="openai", url=f"http://me:{SECRET}@host/v1", cache=CACHE)
    text += description(Upstream(proxied, Metrics()), proxied) + repr(proxied)
    assert "***@127.0.0.1" in text
    assert "***@host" in text
    assert SECRET not in text


MISTAKES = (
    lambda: Settings(cache=f"radis://:{SECRET}@host/0"),
    lambda: Settings(backend="openai", url=f"ftp://me:{SECRET}@host/v1"),
    lambda: make_cache(f"redis://:{SECRET}/2@host:6379/0", ttl=1, mib=1),
    lambda: make_cache(f"redis://:x@host:6379/0?socket_timeout={SECRET}", ttl=1, mib=1),
    lambda: Upstream(Settings(backend="openai", url=f"http://me:{SECRET}@host:{SECRET}/v1"), Metrics()),
)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_url_is_told_without_its_password(mistake) -> None:
    with pytest.raises(ConfigError) as raised:
        mistake()
    text = str(raised.value)
    assert text.startswith(("cache=", "url=", "backend=openai needs url="))
    assert f":{SECRET}@" not in text
    assert f"{SECRET}/2" not in text


def test_neither_clients_nor_the_log_learn_the_password_of_a_server_that_is_not_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    with (
        caplog.at_level(logging.DEBUG),
        proxy(f"http://me:{SECRET}@{address}/v1", name="m", cache=CACHE) as front,
    ):
        for path, body in ASKED.items():
            reply = front.post(path, json=body)
            assert reply.status_code == 502
            assert SECRET not in reply.text + str(reply.headers)
            assert address not in reply.text  # where it lies is not theirs either
            number = reply.headers["x-request-id"]
            assert number in reply.json()["error"]["message"]
            assert any(number in record.getMessage() and address in record.getMessage() for record in caplog.records)
        assert SECRET not in front.get("/metrics").text
    assert "Redis does not answer" in caplog.text
    assert SECRET not in caplog.text


def test_a_password_in_the_url_is_shown_to_the_server_behind_alone() -> None:
    seen = []

    def answer(request) -> "httpx.Response":
        seen.append(request)
        return httpx.Response(200, json={"choices": []})

    with proxy(f"http://me:{SECRET}@elsewhere/v1", name="m", transport=httpx.MockTransport(answer)) as front:
        assert front.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert seen[0].headers["authorization"] == httpx.BasicAuth("me", SECRET)._auth_header
    assert SECRET not in str(seen[0].url)


@pytest.mark.parametrize(("finish_reason", "status"), [("deadline", 504), ("error", 500), ("cancelled", 503)])
def test_every_failure_has_a_number_that_the_log_knows(
    finish_reason: str, status: int, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(tiny, cache=None)
    service.engine = FakeEngine(["a"], finish_reason)
    with caplog.at_level(logging.WARNING, "genai_pl.serving"), serving(service) as client:
        reply = client.post("/generate", json={"prompt": "x"})
        assert reply.status_code == status
        number = reply.headers["x-request-id"]
        assert number in reply.json()["error"]["message"]
        assert any(number in record.getMessage() for record in caplog.records)
        with client.stream("POST", "/generate", json={"prompt": "x", "stream": True}) as reply:
            *_, last = [line for line in reply.iter_lines() if line]
        assert reply.headers["x-request-id"] in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert client.get("/health").headers["x-request-id"] != number


def test_workers_sign_with_the_secret_that_their_server_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from genai_pl.serving.settings import CACHE_KEY, FOLDER, cache_secret, share_between_processes

    monkeypatch.setenv(FOLDER, "anywhere")
    monkeypatch.delenv(CACHE_KEY, raising=False)
    share_between_processes()
    made = os.environ[CACHE_KEY]
    assert len(made) == 64
    assert cache_secret() == made.encode()  # what a process finds that is started with this environment
    monkeypatch.setenv(CACHE_KEY, "of the operator")
    assert cache_secret() == b"of the operator"
