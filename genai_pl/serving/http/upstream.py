"""Another server that speaks OpenAI's API, vLLM for one, with our cache, limits and metrics in front."""

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

log = logging.getLogger("genai_pl.serving")
T = TypeVar("T")


class Upstream:
    """The server behind this one; clients are not told where it is, nor what went wrong in it."""

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
        """Nothing has to be begun: the other server runs."""

    def give_up(self) -> None:
        """Requests that run end with their connections."""

    async def stop(self) -> None:
        """Close all connections."""
        await self.client.aclose()
        if self.cache is not None:
            await self.cache.close()

    async def default_model(self) -> str:
        """The model of requests that name none: the option `name`, or the first one that the other server has."""
        if self.name is None:
            entries = list_of_models(await self.get("models"))
            if not entries:
                raise ApiError(502, "the server behind this one names no model: set name=")
            self.name = entries[0]["id"]
        return self.name

    async def get(self, path: str) -> Json:
        """What the other server answers, as JSON."""
        return await self._fetch("GET", path, None)

    async def post(self, path: str, body: Json) -> Json:
        """The same to a request with a body; repeatable ones are answered from the cache."""
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
        """The events of a stream, each the text of a JSON object; whole streams of repeatable requests are kept."""
        key = self._key(path, body)
        cached = await self._cached(key)
        if isinstance(cached, list):
            for event in cached:
                yield event
                await asyncio.sleep(0)  # nothing has to be waited for: others have their turn
            return
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
            if line is None or not events:
                raise ApiError(502, "the server behind this one broke off its answer")
        self.metrics.finished("stop", 0, len(events))
        if key is not None:
            await self.cache.set(key, json.dumps(events).encode())

    def _key(self, path: str, body: Json) -> str | None:
        if self.cache is None or not (body.get("temperature") == 0 or body.get("seed") is not None):
            return None
        return key_of(str(self.address), path, {k: v for k, v in body.items() if k != "user"})

    async def _cached(self, key: str | None) -> Json | list[str] | None:
        """What the cache has: an answer, or the events of one; None where that is neither."""
        contents = None if key is None else await self.cache.get(key)
        reply_json = None if contents is None else _decode_cached(contents)
        if key is not None:
            self.metrics.cache_lookup(hit=reply_json is not None)
        return reply_json

    async def _fetch(self, method: str, path: str, body: Json | None) -> Json:
        async def fetch() -> Json:
            async with self._open_response(method, path, body) as reply:
                return parse(await read_body(reply))

        return await self._with_timeout(fetch(), time.perf_counter())

    async def _with_timeout(self, work: Awaitable[T], start: float) -> T:
        """What the work gives within the time of a request that began then, however slowly the other server drips."""

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
        """The other server's answer, its body still to be read; ApiError if it is an error or does not come."""
        if self.n_running >= self.limits.queue_size:
            raise too_busy(1.0)
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        self.n_running += 1
        try:
            async with self.client.stream(method, path, content=content, headers=headers) as reply:
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
    """What was kept: an answer, or a list of events that are answers; None where it is anything else."""
    try:
        reply_json = json.loads(contents)
        if isinstance(reply_json, list) and reply_json:
            for event in reply_json:
                sendable(event)
            return reply_json
        return sendable(contents) if isinstance(reply_json, dict) else None
    except (TypeError, ValueError, RecursionError):
        return None
