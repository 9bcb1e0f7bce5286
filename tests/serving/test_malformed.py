"""Fuzzing with requests made from the OpenAPI description: every one is answered, and none with a 5xx."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
hypothesis = pytest.importorskip("hypothesis", reason="needs pip install hypothesis")
httpx = pytest.importorskip("httpx")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genai_pl.serving.app import create_app
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.settings import Limits
from tests.serving.servers import make_service, running, serving

EXAMPLES = 60
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 3),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=30),
    st.sampled_from(["\ud800", "\x00", "🙂", "", "true", "x" * 5000, "../../etc/passwd", "{{ 7 * 7 }}"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


# of the tiny model: no adapters, and no variables in its chat template
LACKING = ("adapter", "chat_template_kwargs", "reasoning_effort", "reasoning", "output_config")


def fitting(schema: dict, parts: dict) -> st.SearchStrategy:
    """Values that a schema of the description allows, roughly."""
    if "$ref" in schema:
        return fitting(parts[schema["$ref"].rpartition("/")[2]], parts)
    if "anyOf" in schema or "oneOf" in schema:
        return st.one_of([fitting(one, parts) for one in schema.get("anyOf", schema.get("oneOf"))])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        known = {"model": st.just("tiny"), "timeout": st.just(20), **dict.fromkeys(LACKING, st.none())}
        fields = {
            name: known[name] if name in known else fitting(one, parts)
            for name, one in schema.get("properties", {}).items()
        }
        required = {name: fields.pop(name) for name in schema.get("required", [])}
        return st.fixed_dictionaries(required, optional=fields)
    if kind == "array":
        return st.lists(fitting(schema.get("items", {}), parts), min_size=schema.get("minItems", 0), max_size=3)
    if kind == "integer":
        low = schema.get("minimum", 0)
        return st.integers(low, low + 2)
    if kind == "number":
        low, high = max(schema.get("minimum", 0), schema.get("exclusiveMinimum", 0)), min(schema.get("maximum", 2), 2)
        return st.floats(low, high, exclude_min=True)
    return {"boolean": st.booleans(), "null": st.none(), "string": st.text(min_size=1, max_size=20)}.get(kind, ANYTHING)


def bodies(schema: dict, parts: dict) -> st.SearchStrategy:
    """Bodies that are valid, wrong in one field, wrong in many, or not JSON."""
    right = fitting(schema, parts)
    names = [*parts[schema["$ref"].rpartition("/")[2]]["properties"], "echo", "best_of"]
    spoiled = st.tuples(right, st.sampled_from(names), ANYTHING).map(lambda t: {**t[0], t[1]: t[2]})
    wrong = st.dictionaries(st.sampled_from(names) | st.text(max_size=10), ANYTHING, max_size=5)
    as_bytes = st.one_of(right, right, spoiled, spoiled, wrong, ANYTHING).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        as_bytes, as_bytes, as_bytes, st.binary(max_size=60), as_bytes.map(lambda body: body[: len(body) // 2])
    )


def requests(description: dict) -> st.SearchStrategy:
    """Path, body and content type of a request."""
    parts = description["components"]["schemas"]
    posts = []
    for path, methods in description["paths"].items():
        if "requestBody" in methods.get("post", {}):
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            posts.append(st.tuples(st.just(path), bodies(schema, parts)))
    kinds = st.sampled_from(
        ["application/json"] * 8 + ["text/plain", "", "multipart/form-data", "application/json; charset=x"]
    )
    return st.tuples(st.one_of(posts), kinds)


LENGTHS = {
    "/generate": "max_new_tokens",
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/messages": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


def shorten(path: str, body: bytes) -> bytes:
    """The body with few tokens to generate unless it sets them: these tests are about what precedes the model."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(content, dict) or path not in LENGTHS:
        return body
    return json.dumps({LENGTHS[path]: 3, **content}).encode()


@pytest.mark.parametrize("n", [EXAMPLES, pytest.param(3000, marks=pytest.mark.slow)])
def test_no_request_makes_the_server_fail(n: int, tiny: Path) -> None:
    service = make_service(tiny, limits=Limits(max_tokens=8, max_n=3, max_inputs=4, max_body_mib=0.1, timeout=20))
    app = create_app(service, service.settings, Metrics())
    description = app.openapi()
    statuses: Counter[int] = Counter()
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:

        @settings(
            max_examples=n,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(requests(description))
        def send(request) -> None:
            (path, body), kind = request
            reply = client.post(path, content=shorten(path, body), headers={"content-type": kind} if kind else {})
            assert reply.status_code < 500, (path, body, reply.text)
            assert "Traceback" not in reply.text
            if reply.status_code >= 400:
                theirs = (
                    {"type", "message"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
                )
                assert set(reply.json()["error"]) == theirs, reply.text
            statuses[reply.status_code] += 1

        send()
        assert client.post("/generate", json={"prompt": "x", "max_new_tokens": 1}).status_code == 200
        assert service.engine.n_running == service.engine.n_waiting == 0
    print(statuses)  # with -s
    # and not because everything is refused; which requests are drawn depends on the modules that are imported
    assert statuses[200] > 0, statuses
    assert statuses[422] > 0, statuses


STATUSES = st.sampled_from([200, 200, 200, 200, 201, 204, 301, 400, 404, 422, 429, 451, 500, 503, 599])
KINDS = st.sampled_from(["application/json", "text/event-stream", "text/html", "", "application/json; charset=x"])
ALMOST = st.fixed_dictionaries(
    {"choices": st.lists(st.dictionaries(st.sampled_from(["text", "finish_reason", "index"]), ANYTHING), max_size=2)},
    optional={"usage": ANYTHING, "data": ANYTHING, "error": ANYTHING, "id": ANYTHING},
)
SAID = st.one_of(ANYTHING, ALMOST, ALMOST).map(lambda value: json.dumps(value).encode())
EVENTS = st.lists(SAID, max_size=3).map(lambda events: b"".join(b"data: " + one + b"\n\n" for one in events))
REPLIES = st.tuples(
    st.one_of(SAID, EVENTS, EVENTS.map(lambda b: b + b"data: [DONE]\n\n"), st.binary(max_size=60)), STATUSES, KINDS
)


def test_no_answer_of_another_server_makes_ours_fail() -> None:
    from genai_pl.serving.http.upstream import Upstream
    from genai_pl.serving.settings import Settings

    given_reply = [(b"", 200, "")]

    def answer(request: "httpx.Request") -> "httpx.Response":
        content, status, kind = given_reply[0]
        return httpx.Response(status, content=content, headers={"content-type": kind})

    proxied, metrics = Settings(backend="openai", url="http://elsewhere/v1", name="m"), Metrics()
    app = create_app(Upstream(proxied, metrics, transport=httpx.MockTransport(answer)), proxied, metrics)
    statuses: Counter[int] = Counter()
    bodies = {
        "/generate": {"prompt": "x", "temperature": 0},
        "/v1/completions": {"prompt": "x", "seed": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/embeddings": {"input": "x"},
    }
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:

        @settings(
            max_examples=EXAMPLES // 2,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(REPLIES, st.sampled_from(sorted(bodies)), st.booleans())
        def send(reply, path: str, stream: bool) -> None:
            given_reply[0] = reply
            body = {**bodies[path], **({"stream": True} if stream and path != "/v1/embeddings" else {})}
            answered = client.post(path, json=body)
            assert answered.status_code in (200, 502) or 400 <= answered.status_code < 500, (reply, answered.text)
            if answered.status_code != 200:
                assert set(answered.json()["error"]) == {"message", "type", "param", "code"}
            statuses[answered.status_code] += 1

        send()
    assert statuses[502] > 0, statuses


HEADERS = b"Host: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
HTTP = b"POST /generate HTTP/1.1\r\n" + HEADERS + b'{"prompt": "x"}'
CUTS = st.lists(st.tuples(st.integers(0, len(HTTP)), st.binary(max_size=8), st.integers(0, 8)), max_size=4)


def test_no_bytes_make_the_server_fail(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from genai_pl.serving import connections
    from genai_pl.serving.http import bodies

    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(bodies, "SECONDS", 0.3)
    answered = 0

    service = make_service(tiny, limits=Limits(max_tokens=2, timeout=20))
    app = create_app(service, service.settings, Metrics())
    with running(app, **connections.connection_options()) as url, httpx.Client(base_url=url, timeout=30) as client:
        place = (client.base_url.host, client.base_url.port)

        @settings(max_examples=EXAMPLES // 2, deadline=None, database=None, derandomize=True)
        @given(CUTS, st.booleans())
        def send(cuts, twice: bool) -> None:
            nonlocal answered
            data = HTTP * 2 if twice else HTTP
            for where, new, dropped in cuts:
                data = data[:where] + new + data[where + dropped :]
            with socket.create_connection(place, timeout=20) as raw:
                raw.sendall(data)
                content = bytearray()
                try:
                    while part := raw.recv(65536):
                        content += part
                except ConnectionResetError:
                    pass
            assert b"HTTP/1.1 5" not in content, (data, content)
            answered += content.startswith(b"HTTP/1.1 200")

        send()
        assert client.post("/generate", json={"prompt": "x", "max_new_tokens": 1}).status_code == 200
    assert answered > 0  # and not because nothing is read


PATHS = ("/generate/", "/%00", "/v1", "/v1/models/%F0%9F%99%82", "/../serve.py", "/static/../app.py", "/v1/models/")


@pytest.mark.parametrize("path", PATHS)
def test_strange_paths_are_not_found(path: str, client) -> None:
    reply = client.get(path)
    assert reply.status_code in (307, 404, 405)
    if reply.status_code != 307:
        assert reply.json()["error"]["message"]


def test_a_description_of_the_proxy_is_the_same(tiny: Path) -> None:
    from genai_pl.serving.http.upstream import Upstream
    from genai_pl.serving.settings import Settings

    proxied = Settings(backend="openai", url="http://elsewhere/v1")
    metrics = Metrics()
    theirs = create_app(Upstream(proxied, metrics), proxied, metrics).openapi()
    with serving(make_service(tiny)) as client:
        ours = client.get("/openapi.json").json()
    # conversations that are kept here, and tokens of a model that is here
    local = {"/tokenize", "/detokenize", "/v1/messages", "/v1/messages/count_tokens"}
    local |= {"/v1/responses", "/v1/responses/{name}", "/v1/responses/input_tokens"}
    local |= {"/v1/responses/{name}/input_items", "/v1/responses/{name}/cancel"}
    assert set(ours["paths"]) - set(theirs["paths"]) == local
    for path, methods in theirs["paths"].items():
        for method, operation in methods.items():
            assert ours["paths"][path][method].get("requestBody") == operation.get("requestBody")
