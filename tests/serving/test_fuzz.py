"""Fuzzing of every route: no request makes the server fail or hang, and a known one is answered afterwards as before."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

import httpx

from genai_pl.config.labels import Labels
from genai_pl.serving.app import create_app
from genai_pl.serving.connections import connection_options
from genai_pl.serving.service import Service
from genai_pl.serving.settings import Limits
from tests.serving.fuzz import BODIES, Requests, Sent, leave
from tests.serving.servers import eventually, make_service, running, write_model
from tests.serving.test_adapter_reload import write_adapter
from tests.serving.thinking import write_thinking_model

TIMEOUT = 30.0  # seconds after which an answer counts as none
LIMITS = Limits(max_tokens=8, max_n=3, max_inputs=8, max_body_mib=0.1, timeout=TIMEOUT / 2, stored_mib=0.1)
SEEDED = {"temperature": 0.9, "seed": 11, "max_tokens": 6}
KNOWN = {
    "/v1/completions": {"prompt": "Once", "logprobs": 3, **SEEDED},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "logprobs": True, **SEEDED},
    "/generate": {"prompt": "Once", "adapter": "polite", "temperature": 0},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/score": {"text": "a king"},
    "/classify": {"input": "a"},
    "/rerank": {"query": "tea", "documents": ["a", "b"]},
}
# another kind of model for each group of routes
KINDS: dict[str, dict[str, object]] = {
    "writer": {},
    "classifier": {"head": "score", "n_labels": 2, "extra": Labels(("no", "yes")).values()},
    "ranker": {"head": "score", "n_labels": 1, "extra": Labels(("relevance",)).values()},
    "reward": {"head": "score"},
    "encoder": {"shape": "encoder"},
    "translator": {"shape": "encoder_decoder", "position": "relative"},
}
FULL = {"writer": 3500, **dict.fromkeys(("classifier", "ranker", "reward", "encoder", "translator"), 300)}


def build(kind: str, folder: Path) -> Service:
    """The service of a tiny random model; the writer's has tools, thoughts, and adapters that may be loaded."""
    if kind != "writer":
        return make_service(write_model(folder / kind, **KINDS[kind]), limits=LIMITS, cache=None, name="tiny")
    base, root = write_thinking_model(folder / "tiny"), folder / "adapters"
    adapters = {"polite": str(write_adapter(base, root / "polite", 1))}
    return make_service(base, limits=LIMITS, cache=None, adapters=adapters, adapters_root=str(root))


def checked(sent: Sent, reply: httpx.Response) -> None:
    """Fail unless the answer is one: no failure of the server, strict JSON, errors in their shape, streams to their end."""
    told = (sent, reply.text[:500])
    is_late = reply.status_code == 504 and b'"timeout"' in sent.body  # as the request has asked
    assert reply.status_code < 500 or is_late, told
    assert "Traceback" not in reply.text, told
    if "event-stream" in reply.headers.get("content-type", ""):
        events = [line[6:] for line in reply.text.split("\n") if line.startswith("data: ")]
        values = [strict(event) for event in events if event != "[DONE]"]
        errors = [value["error"]["type"] for value in values if isinstance(value, dict) and value.get("error")]
        assert not {"server_error", "api_error", "unavailable_error"} & set(errors), told
        assert values, told
    elif reply.headers.get("content-type") == "application/json" and sent.method != "HEAD":
        value = strict(reply.text)
        if reply.status_code >= 400:
            is_theirs = sent.path.startswith("/v1/messages")
            names = {"type", "message"} if is_theirs else {"message", "type", "param", "code"}
            assert set(value["error"]) == names, told


def strict(text: str) -> object:
    """JSON without NaN and without half a surrogate pair."""
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    json.dumps(value, ensure_ascii=False)
    return value


def known_answers(service: Service, client: httpx.Client) -> dict[str, object]:
    """The answers to the known requests, read anew, without what every answer has of its own."""
    if service.engine is not None:  # what is cached of a prompt gives equal answers, but for rounding
        blocks = service.engine.model_runner.prefix_blocks
        service.engine.run_between_steps(lambda: blocks and blocks.forget("base")).result(TIMEOUT)
    found = {}
    for path, body in KNOWN.items():
        reply = client.post(path, json=body)
        own = {"id": None, "created": None}
        found[path] = {**reply.json(), **own} if reply.is_success else reply.status_code
    return found


def fuzz(service: Service, n: int, caplog: pytest.LogCaptureFixture, *, seed: int = 0) -> Counter[int]:
    """Statuses of n requests, every one checked; 0 for those whose client has left."""
    caplog.set_level(logging.ERROR)
    app = create_app(service, service.settings, service.metrics, (), ("admin",))
    requests, statuses = Requests(app.openapi(), seed), Counter()
    with running(app, **connection_options()) as url, httpx.Client(base_url=url, timeout=TIMEOUT) as client:
        place = (client.base_url.host, client.base_url.port)
        before = known_answers(service, client)
        for _, sent in zip(range(n), requests, strict=False):
            if sent.leaves is not None:
                leave(place, sent, TIMEOUT)
                statuses[0] += 1
                continue
            try:
                reply = client.request(sent.method, sent.path, content=sent.body, headers=sent.headers)
            except httpx.HTTPError as error:
                pytest.fail(f"{error!r} to {sent}")
            checked(sent, reply)
            statuses[reply.status_code] += 1
            if sent.path == "/v1/responses" and reply.status_code == 200 and b"stream" not in sent.body:
                requests.known.append(reply.json()["id"])
            assert not caplog.records, (sent, caplog.text)
        # nothing is left of it: no slot, no place in a queue, no adapter that waits for a request
        if service.engine is not None:
            assert eventually(lambda: service.engine.n_running == service.engine.n_waiting == 0)
            assert eventually(lambda: not any(service.engine.adapters.n_users.values()))
            if service.adapters.root is not None:
                again = {"name": "polite", "path": "polite"}
                headers = {"authorization": "Bearer admin"}
                assert client.post("/admin/adapters", json=again, headers=headers).status_code == 200
        assert known_answers(service, client) == before
    assert not caplog.records, caplog.text
    print(statuses)  # with -s
    return statuses


def test_a_few_requests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = build("writer", tmp_path)
    paths = create_app(service, service.settings, service.metrics, (), ("admin",)).openapi()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == set(BODIES)
    statuses = fuzz(service, 150, caplog)
    assert statuses[200] > 30
    assert statuses[422] > 20
    assert statuses[0] > 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_five_thousand_requests(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert sum(FULL.values()) == 5000
    statuses = fuzz(build(kind, tmp_path), FULL[kind], caplog, seed=1)
    assert statuses[200] > FULL[kind] / 20
    assert statuses[422] > FULL[kind] / 20
