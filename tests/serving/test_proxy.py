"""backend=openai: validation, metrics and cache in front of an upstream server."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.serving.app import create_app
from genai_pl.serving.http.upstream import Upstream
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.server import bind
from genai_pl.serving.settings import Limits, Settings
from tests.serving.servers import running


@contextmanager
def proxy(url: str, *, transport=None, **options: object) -> "Iterator[httpx.Client]":
    settings = Settings(backend="openai", url=url, **options)
    metrics = Metrics()
    app = create_app(Upstream(settings, metrics, transport=transport), settings, metrics)
    with running(app) as own, httpx.Client(base_url=own, timeout=60) as front:
        yield front


@pytest.fixture
def front(client) -> "Iterator[httpx.Client]":
    """A client of a proxy in front of a second server of this project, which has OpenAI's API."""
    with proxy(f"{client.base_url}/v1") as front:
        yield front


def without_names(answer: dict) -> dict:
    return {k: v for k, v in answer.items() if k not in ("id", "created")}


ASKED = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 6, "temperature": 0, "logprobs": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0},
    "/v1/embeddings": {"input": ["one", "two"]},
    "/generate": {"prompt": "Once", "max_new_tokens": 6, "temperature": 0},
}


@pytest.mark.parametrize("path", ASKED)
def test_the_answer_is_the_other_servers(path: str, client, front) -> None:
    assert without_names(front.post(path, json=ASKED[path]).json()) == without_names(
        client.post(path, json=ASKED[path]).json()
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_streams_pass_through_and_are_remembered(path: str, client, front) -> None:
    body = {**ASKED[path], "stream": True}

    def events(server) -> list[dict]:
        with server.stream("POST", path, json=body) as reply:
            lines = [line[6:] for line in reply.iter_lines() if line]
        assert lines.pop() == "[DONE]"
        return [without_names(json.loads(line)) for line in lines]

    direct = events(client)
    if path == "/generate":  # the texts of events may be divided otherwise
        assert "".join(e["text"] for e in events(front)) == "".join(e["text"] for e in direct)
        assert events(front)[-1] == direct[-1]
    else:
        assert events(front) == events(front) == direct
    assert 'genai_pl_cache_lookups_total{result="hit"} 1.0' in front.get("/metrics").text


def test_models_are_the_other_servers(client, front) -> None:
    assert front.get("/v1/models").json() == client.get("/v1/models").json()
    assert front.get("/v1/models/tiny").json()["id"] == "tiny"
    assert front.get("/v1/models/other").status_code == 404


def test_what_the_other_server_does_not_take_is_told(front) -> None:
    reply = front.post("/v1/completions", json={"prompt": "x" * 200})
    assert reply.status_code == 400
    assert "200 tokens" in reply.json()["error"]["message"]
    reply = front.post("/v1/completions", json={"prompt": "x", "top_a": 3})  # an option that only it can judge
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "top_a")
    assert front.post("/v1/completions", json={"prompt": 3}).status_code == 422  # judged here
    assert front.post("/score", json={"text": "x"}).status_code == 400


def test_a_server_that_is_not_there_is_a_bad_gateway() -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with proxy(f"http://127.0.0.1:{port}/v1", name="m") as front:
        for path, body in ASKED.items():
            reply = front.post(path, json=body)
            assert reply.status_code == 502
            assert "cannot be reached" in reply.json()["error"]["message"]
        assert front.post("/v1/completions", json={"prompt": "x", "stream": True}).status_code == 502
        assert front.get("/health").status_code == 200


STRANGE = {
    "no JSON": (lambda request: httpx.Response(200, text="<html>"), 502),
    "a failure": (lambda request: httpx.Response(503, text="no"), 502),
    "a wrong key": (lambda request: httpx.Response(401, json={"error": {"message": "key sk-secret is wrong"}}), 502),
    "too busy": (
        lambda request: httpx.Response(429, json={"error": {"message": "wait"}}, headers={"retry-after": "7"}),
        429,
    ),
    "an error that is text": (lambda request: httpx.Response(400, json={"error": "bad"}), 400),
    "a list": (lambda request: httpx.Response(200, json=[1]), 502),
}


@pytest.mark.parametrize("case", STRANGE)
def test_strange_answers_are_errors_in_our_shape(case: str) -> None:
    answer, status = STRANGE[case]
    with proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(answer)) as front:
        reply = front.post("/v1/completions", json={"prompt": "x"})
        assert reply.status_code == status
        assert reply.json()["error"]["message"]
        if status == 429:
            assert reply.headers["retry-after"] == "7"


def test_a_stream_that_breaks_off_ends_in_an_error() -> None:
    def half(request) -> "httpx.Response":
        return httpx.Response(200, text='data: {"choices": []}\n\n')

    with proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(half)) as front:
        text = front.post("/v1/completions", json={"prompt": "x", "stream": True}).text
    assert "broke off" in text
    assert "[DONE]" not in text


def test_its_key_and_the_first_model_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-ours")
    seen = []

    def answer(request) -> "httpx.Response":
        seen.append(request)
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]})
        return httpx.Response(200, json={"choices": [], "usage": None})

    transport = httpx.MockTransport(answer)
    with proxy("http://elsewhere/v1", key_variable="UPSTREAM_KEY", transport=transport) as front:
        front.post("/v1/completions", json={"prompt": "x", "guided_regex": "a+", "timeout": 3})
    assert [request.headers["authorization"] for request in seen] == ["Bearer sk-ours"] * 2
    assert json.loads(seen[1].content) == {"model": "first", "prompt": "x", "guided_regex": "a+"}


def test_too_many_at_once_are_told_to_come_again() -> None:
    import asyncio

    async def slow(request) -> "httpx.Response":
        await asyncio.sleep(30)
        return httpx.Response(200, json={})

    with proxy(
        "http://elsewhere/v1", name="m", transport=httpx.MockTransport(slow), limits=Limits(queue_size=1)
    ) as front:
        with pytest.raises(httpx.ReadTimeout):
            front.post("/v1/completions", json={"prompt": "x"}, timeout=0.2)
        # whoever left has freed the place
        with pytest.raises(httpx.ReadTimeout):
            front.post("/v1/completions", json={"prompt": "x"}, timeout=0.2)


def test_the_settings_need_no_checkpoint(tmp_path: Path) -> None:
    assert Settings(backend="openai", url="http://h/v1").checkpoint == "auto"
