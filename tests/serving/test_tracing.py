"""OpenTelemetry traces: spans of requests and of their answers, in the trace of the client that asks."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

import httpx

from genai_pl.errors import ConfigError
from genai_pl.serving.app import create_app
from genai_pl.serving.engine.request import TokenStream
from genai_pl.serving.http.upstream import Upstream
from genai_pl.serving.json_logs import JsonFormatter
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.settings import Settings
from genai_pl.serving.tracing import Tracing, open_tracing, stages
from tests.serving.servers import eventually, make_service, running

# of W3C's Trace Context, section 3.2.2.5
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def exporter() -> object:
    pytest.importorskip("opentelemetry.sdk", reason="needs pip install -e '.[traces]'")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter) -> Tracing:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    return Tracing(SimpleSpanProcessor(exporter))


@pytest.fixture
def traced(tiny: Path, tracing: Tracing) -> Iterator[httpx.Client]:
    service = make_service(tiny, cache=None)
    app = create_app(service, service.settings, service.metrics, tracing=tracing)
    with running(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_a_request_has_a_span_with_the_parts_of_each_answer(traced: httpx.Client, exporter) -> None:
    body = {"prompt": "Once upon a time there", "max_tokens": 5, "n": 2, "seed": 1, "temperature": 1}
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "x-request-id": "mine"}
    for stream in (False, True):
        exporter.clear()
        assert traced.post("/v1/completions", json={**body, "stream": stream}, headers=headers).status_code == 200
        assert eventually(lambda: any(span.parent and span.parent.is_remote for span in exporter.get_finished_spans()))
        spans = {span.context.span_id: span for span in exporter.get_finished_spans()}
        [whole] = [span for span in spans.values() if span.kind.name == "SERVER"]
        assert whole.name == "POST /v1/completions"
        assert dict(whole.attributes) == {
            "http.request.method": "POST",
            "http.route": "/v1/completions",
            "http.response.status_code": 200,
            "genai_pl.request_id": "mine",
        }
        # the client's trace goes on
        assert f"{whole.context.trace_id:032x}-{whole.parent.span_id:016x}" == TRACEPARENT[3:-3]
        assert whole.context.trace_state.get("vendor") == "1"
        # two answers, whose parts follow each other inside of the request
        parts = [span for span in spans.values() if span is not whole]
        assert [span.name for span in parts] == ["queue", "prefill", "decode"] * 2
        for queue, prefill, decode in (parts[:3], parts[3:]):
            times = [queue.start_time, queue.end_time, prefill.end_time, decode.end_time]
            assert times == sorted(times)
            assert (prefill.start_time, decode.start_time) == (queue.end_time, prefill.end_time)
            assert whole.start_time <= times[0]
            assert times[-1] <= whole.end_time
            assert prefill.attributes["gen_ai.usage.input_tokens"] == 22
            assert decode.attributes["gen_ai.usage.output_tokens"] <= 5
            assert decode.attributes["gen_ai.response.finish_reasons"][0] in ("length", "stop")
        assert {span.parent.span_id for span in parts} == {whole.context.span_id}


def test_what_fails_is_marked_and_what_is_polled_has_no_span(traced: httpx.Client, exporter, monkeypatch) -> None:
    for path in ("/health", "/ready", "/metrics", "/"):
        traced.get(path)
    assert traced.post("/v1/completions", json={"prompt": []}).status_code == 422
    assert traced.get("/none", headers={"traceparent": "nonsense"}).status_code == 404
    assert eventually(lambda: len(exporter.get_finished_spans()) == 2)
    refused, unknown = exporter.get_finished_spans()
    assert (refused.attributes["http.response.status_code"], refused.status.is_ok) == (422, True)
    assert (unknown.name, unknown.parent) == ("GET other", None)
    # a failure of the server
    from genai_pl.serving.service import Service

    async def fail(*arguments: object) -> None:
        raise RuntimeError("a wire is loose")

    monkeypatch.setattr(Service, "tokens", fail)
    assert traced.post("/v1/completions", json={"prompt": "x"}).status_code == 500
    assert eventually(lambda: len(exporter.get_finished_spans()) == 3)
    assert exporter.get_finished_spans()[-1].status.status_code.name == "ERROR"


def test_a_trace_goes_on_in_the_server_behind_this_one(tracing: Tracing, exporter) -> None:
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("traceparent"))
        return httpx.Response(200, json={"choices": [{"text": "a", "index": 0, "finish_reason": "stop"}], "usage": {}})

    settings, metrics = Settings(backend="openai", url="http://elsewhere/v1", name="m"), Metrics()
    upstream = Upstream(settings, metrics, transport=httpx.MockTransport(answer))
    with running(create_app(upstream, settings, metrics, tracing=tracing)) as url:
        httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, headers={"traceparent": TRACEPARENT})
        assert eventually(exporter.get_finished_spans)
    [span] = exporter.get_finished_spans()
    asked = [one for one in seen if one is not None]
    assert asked == [f"00-{TRACEPARENT[3:35]}-{span.context.span_id:016x}-01"]


def test_a_line_of_the_log_has_the_trace(tracing: Tracing) -> None:
    scope = {"path": "/generate", "method": "POST", "headers": [(b"traceparent", TRACEPARENT.encode())]}
    record = logging.LogRecord("x", logging.WARNING, "", 0, "well", (), None)
    trace = tracing.begin(scope, "1")
    assert json.loads(JsonFormatter().format(record))["trace"] == TRACEPARENT[3:35]
    tracing.end(trace, "/generate", 200)
    tracing.begin({**scope, "path": "/health"}, "2")
    assert "trace" not in json.loads(JsonFormatter().format(record))


def test_an_answer_that_was_left_has_the_parts_that_it_came_to() -> None:
    stream = TokenStream(lambda: None)
    assert [stage.name for stage in stages(stream, 3)] == ["queue"]
    stream.times.started = stream.times.queued + 5
    queue, prefill = stages(stream, 3)
    assert (queue.end - queue.begin, prefill.begin) == (5, queue.end)
    assert prefill.end >= prefill.begin


def test_options_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"otlp_endpoint=\S+ is not http"):
        Settings(otlp_endpoint="collector:4317")
    assert open_tracing(None) is None
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setattr("genai_pl.serving.tracing.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install -e"):
        open_tracing("http://127.0.0.1:4318")
