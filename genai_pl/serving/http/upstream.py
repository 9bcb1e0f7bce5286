"""Upstream: a client of another server with OpenAI's API (vLLM, TGI), behind this server's cache, limits and metrics."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import httpx

from genai_pl.config.redaction import redact
from genai_pl.errors import ConfigError
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.http.streaming import DONE
from genai_pl.serving.http.upstream_answers import (
    Json,
    client_error,
    list_of_models,
    list_of_objects,
    parse,
    read_body,
    read_lines,
    sendable,
    token_count,
    upstream_errors,
)
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.response_cache import key_of, make_cache
from genai_pl.serving.settings import Settings
from genai_pl.serving.tracing import trace_headers

log = logging.getLogger("genai_pl.serving")
T = TypeVar("T")


class Upstream:
    """The upstream server; clients learn neither its address nor what failed in it.

    settings: url (with user:password@ if needed), the variable of its API key, timeout, queue_size, cache
    metrics: counts answers, tokens and cache lookups
    transport: httpx transport, for tests

    `queue_size` bounds the requests that run at once: waiting is the upstream server's own affair.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, metrics
        key = os.environ.get(settings.key_variable)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            url = httpx.URL(settings.url.rstrip("/") + "/")
        except (httpx.InvalidURL, ValueError):  # its message may show a part of the password
            raise ConfigError(f"url={redact(settings.url)}: write http://HOST:PORT/v1") from None
        if not url.host:
            raise ConfigError(f"url={redact(settings.url)} names no host: write http://HOST:PORT/v1")
        self.address = url.copy_with(userinfo=b"")
        auth = (url.username, url.password) if url.userinfo else None
        timeout = httpx.Timeout(settings.limits.timeout, connect=5.0)
        self.client = httpx.AsyncClient(
            base_url=self.address, auth=auth, headers=headers, timeout=timeout, transport=transport
        )
        self.cache = make_cache(settings.cache, ttl=settings.cache_ttl, mib=settings.cache_mib)
        self.n_running, self.n_waiting = 0, 0
        self.name = settings.name

    def start(self) -> None:
        """Do nothing: the upstream server runs already."""

    def give_up(self) -> None:
        """Do nothing: requests end with the clients' connections, which uvicorn cuts."""

    async def stop(self) -> None:
        """Close the connections to upstream server and cache."""
        await self.client.aclose()
        if self.cache is not None:
            await self.cache.close()

    async def default_model(self) -> str:
        """The model of requests that name none: the option `name`, else the first model of the upstream server."""
        if self.name is None:
            entries = list_of_models(await self.get("models"))
            if not entries:
                raise ApiError(502, "the server behind this one names no model: set name=")
            self.name = entries[0]["id"]
        return self.name

    async def get(self, path: str) -> Json:
        """The JSON answer to a GET."""
        return await self._fetch("GET", path, None)

    async def post(self, path: str, body: Json) -> Json:
        """The JSON answer to a POST, from the cache if the request is repeatable; ApiError 502 for anything unexpected."""
        key = self._key(path, body)
        cached = await self._cached(key)
        if isinstance(cached, dict):
            return cached
        reply_json = await self._fetch("POST", path, body)
        with upstream_errors():
            list_of_objects(reply_json, "data" if path == "embeddings" else "choices")
            costs = reply_json.get("usage")
            self.metrics.finished("stop", token_count(costs, "prompt_tokens"), token_count(costs, "completion_tokens"))
        if key is not None:
            await self.cache.set(key, json.dumps(reply_json).encode())
        return reply_json

    async def stream(self, path: str, body: Json) -> AsyncIterator[str]:
        """Events of a streamed POST, each the text of a JSON object; complete streams of repeatable requests are cached."""
        # from the cache
        key = self._key(path, body)
        cached = await self._cached(key)
        if isinstance(cached, list):
            for event in cached:
                yield event
                await asyncio.sleep(0)  # the loop's other tasks run between two events
            return
        # from the upstream server; `[DONE]` is left out
        events: list[str] = []
        start = last = time.perf_counter()
        async with self._open_response("POST", path, body) as reply, aclosing(read_lines(reply)) as source:
            while (line := await self._with_timeout(anext(source, None), start)) is not None:
                if not line.startswith("data:"):
                    continue
                event = line.removeprefix("data:").strip()
                if event == DONE:
                    break
                if "error" in (chunk := parse(event)):
                    raise ApiError(502, "the server behind this one broke off its answer", reason=chunk["error"])
                now = time.perf_counter()
                self.metrics.token(now - last) if events else self.metrics.first_token(now - start)
                last = now
                events.append(event)
                yield event
            # without [DONE] the connection broke, and the answer is not complete
            if line is None or not events:
                raise ApiError(502, "the server behind this one broke off its answer")
        self.metrics.finished("stop", 0, len(events))
        if key is not None:
            await self.cache.set(key, json.dumps(events).encode())

    def _key(self, path: str, body: Json) -> str | None:
        """Cache key of a repeatable request (greedy, or with a seed), else None; `user` never changes an answer."""
        if self.cache is None or not (body.get("temperature") == 0 or body.get("seed") is not None):
            return None
        return key_of(str(self.address), path, {k: v for k, v in body.items() if k != "user"})

    async def _cached(self, key: str | None) -> Json | list[str] | None:
        """The cached answer, or the list of a stream's events; None if there is none that can be sent."""
        contents = None if key is None else await self.cache.get(key)
        reply_json = None if contents is None else _decode_cached(contents)
        if key is not None:
            self.metrics.cache_lookup(hit=reply_json is not None)
        return reply_json

    async def _fetch(self, method: str, path: str, body: Json | None) -> Json:
        """The JSON answer, within the timeout."""

        async def fetch() -> Json:
            async with self._open_response(method, path, body) as reply:
                return parse(await read_body(reply))

        return await self._with_timeout(fetch(), time.perf_counter())

    async def _with_timeout(self, work: Awaitable[T], start: float) -> T:
        """Result of the work, within the timeout of the request that began at `start`; ApiError 504 after it.

        httpx's own timeouts count from byte to byte, and a server that drips would never exceed them.
        """

        async def awaited() -> T:
            return await work

        try:
            return await asyncio.wait_for(awaited(), start + self.limits.timeout - time.perf_counter())
        except asyncio.TimeoutError:
            raise self._timeout_error() from None

    def _timeout_error(self) -> ApiError:
        return ApiError(504, f"the server behind this one did not answer within {self.limits.timeout:g} seconds")

    @asynccontextmanager
    async def _open_response(
        self, method: str, path: str, body: Mapping[str, object] | None
    ) -> AsyncIterator[httpx.Response]:
        """Context with the upstream server's response, its body unread.

        Raises ApiError 429 at queue_size running requests, 502 or 504 if it cannot be reached, and its own 4xx.
        """
        if self.n_running >= self.limits.queue_size:
            raise too_busy(1.0)
        content = None if body is None else json.dumps(body).encode()
        headers = trace_headers() | ({} if body is None else {"Content-Type": "application/json"})
        self.n_running += 1
        try:
            async with self.client.stream(method, path, content=content, headers=headers) as reply:
                # the body of an error is read here, that of an answer by the caller
                if reply.status_code != 200:
                    raise client_error(reply, await self._with_timeout(read_body(reply), time.perf_counter()))
                yield reply
        except httpx.TimeoutException:
            raise self._timeout_error() from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = f"{self.address}: {type(error).__name__}: {error}"
            raise ApiError(502, "the server behind this one cannot be reached", reason=reason) from None
        finally:
            self.n_running -= 1


def _decode_cached(contents: bytes) -> Json | list[str] | None:
    """A cached answer or list of events; None for anything else, which someone else must have written."""
    try:
        reply_json = json.loads(contents)
        if isinstance(reply_json, list) and reply_json:
            for event in reply_json:
                sendable(event)
            return reply_json
        return sendable(contents) if isinstance(reply_json, dict) else None
    except (TypeError, ValueError, RecursionError):
        return None
