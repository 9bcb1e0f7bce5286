"""Traces: a span for each HTTP request, with spans of each answer in the queue, in prefill and in decoding (OpenTelemetry).

    POST /v1/chat/completions     from the head of the request to the last byte of the answer
        queue                     until the answer had a slot
        prefill                   until its first token
        decode                    until its end

A request that brings a W3C `traceparent` continues that trace. The engine knows nothing of spans: it writes four times into each
TokenStream, of which spans are made once the request has ended.
"""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from starlette.types import Scope

from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

    from genai_pl.serving.engine.request import TokenStream

NEEDS = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
UNTRACED = {"/", "/health", "/ready", "/metrics", "/openapi.json", "/docs"}  # polled, and no work
FLUSH_SECONDS = 3.0  # at the end, for spans that are still to be sent


class Stage(NamedTuple):
    """A part of an answer's time, in Unix nanoseconds."""

    name: str
    begin: int
    end: int
    attributes: dict[str, object]


class RequestTrace:
    """The trace of the current request. streams: its answers, with the number of their prompts' tokens."""

    def __init__(self, span: "Span", method: str) -> None:
        self.span, self.method = span, method
        self.streams: list[tuple[TokenStream, int]] = []

    def headers(self) -> dict[str, str]:
        """Headers that let another server continue this trace."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(self.span))
        return headers


TRACE: ContextVar[RequestTrace | None] = ContextVar("trace", default=None)  # of the current request


class Tracing:
    """Makes spans of requests.

    processor: sends them on; samplers and the service's name follow OpenTelemetry's variables (OTEL_TRACES_SAMPLER, ...)
    """

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        is_named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        self.provider = TracerProvider(resource=Resource.create({} if is_named else {"service.name": "genai_pl"}))
        self.provider.add_span_processor(processor)
        self.tracer = self.provider.get_tracer("genai_pl.serving")

    def begin(self, scope: Scope, number: str) -> RequestTrace | None:
        """The trace of a request with this id, which is the current one from now on; None for paths without work."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TRACE.set(None)
        if scope["path"] in UNTRACED:
            return None
        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "genai_pl.request_id": number}
        parent = TraceContextTextMapPropagator().extract(given)
        span = self.tracer.start_span(scope["method"], parent, kind=SpanKind.SERVER, attributes=attributes)
        trace = RequestTrace(span, scope["method"])
        TRACE.set(trace)
        return trace

    def end(self, trace: RequestTrace, route: str, status: int) -> None:
        """End a request's span, and make those of its answers."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        context = set_span_in_context(trace.span)
        for stream, n_prompt in trace.streams:
            for stage in stages(stream, n_prompt):
                child = self.tracer.start_span(stage.name, context, attributes=stage.attributes, start_time=stage.begin)
                child.end(stage.end)
        trace.span.update_name(f"{trace.method} {route}")
        trace.span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            trace.span.set_status(Status(StatusCode.ERROR))
        trace.span.end()

    async def close(self) -> None:
        """Send what is left, for some seconds."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(self.provider.shutdown), FLUSH_SECONDS)


def stages(stream: "TokenStream", n_prompt: int) -> Iterator[Stage]:
    """Queue, prefill and decode of an answer, as far as it came; one that a client has left may not have ended yet."""
    times = stream.times
    end = times.ended or time.time_ns()
    yield Stage("queue", times.queued, times.started or end, {})
    if times.started is not None:
        read = {"gen_ai.usage.input_tokens": n_prompt, "genai_pl.cached_tokens": stream.n_cached}
        yield Stage("prefill", times.started, times.first_token or end, read)
    if times.first_token is not None:
        reasons = [stream.last_reason or "cancelled"]
        written = {"gen_ai.usage.output_tokens": stream.n_generated, "gen_ai.response.finish_reasons": reasons}
        yield Stage("decode", times.first_token, end, written)


def note_answer(stream: "TokenStream", n_prompt: int) -> None:
    """Make an answer, with its prompt's tokens, part of the current request's trace, if there is one."""
    if (trace := TRACE.get()) is not None:
        trace.streams.append((stream, n_prompt))


def trace_headers() -> dict[str, str]:
    """Headers for a request to another server, with the current trace; none without one."""
    trace = TRACE.get()
    return {} if trace is None else trace.headers()


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Tracing to an OTLP collector, None for no endpoint; ConfigError if packages are missing."""
    if endpoint is None:
        return None
    if not all(map(_is_there, NEEDS)):
        raise ConfigError("otlp_endpoint needs OpenTelemetry: pip install -e '.[traces]'")
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")))


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
