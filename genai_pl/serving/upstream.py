"""Another server that speaks OpenAI's API, vLLM for one, with our cache, limits and metrics in front."""

import json
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx

from genai_pl.serving.cache import key_of, make_cache
from genai_pl.serving.errors import ApiError, too_busy
from genai_pl.serving.events import DONE
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.settings import Settings

log = logging.getLogger("genai_pl.serving")
Json = dict[str, object]


class Upstream:
    """The server behind this one."""

    def __init__(
        self, settings: Settings, metrics: Metrics, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.settings, self.limits, self.metrics = settings, settings.limits, metrics
        key = os.environ.get(settings.key_variable)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = settings.url.rstrip("/") + "/"
        timeout = httpx.Timeout(settings.limits.timeout, connect=5.0)
        self.client = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, transport=transport)
        self.cache = make_cache(settings.cache, ttl=settings.cache_ttl, mib=settings.cache_mib)
        self.n_running, self.n_waiting = 0, 0
        self.name = settings.name

    def start(self) -> None:
        """Nothing has to be begun: the other server runs."""

    async def stop(self) -> None:
        """Close all connections."""
        await self.client.aclose()
        if self.cache is not None:
            await self.cache.close()

    async def default_model(self) -> str:
        """The model of requests that name none: the option `name`, or the first one that the other server has."""
        if self.name is None:
            found = await self.get("models")
            try:
                self.name = str(found["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise ApiError(502, f"{self.settings.url} names no model: set name=") from None
        return self.name

    async def get(self, path: str) -> Json:
        """What the other server answers, as JSON."""
        async with self._sent("GET", path, None) as reply:
            return _json(await reply.aread())

    async def post(self, path: str, body: Json) -> Json:
        """The same to a request with a body; repeatable ones are answered from the cache."""
        key = self._key(path, body)
        if (kept := await self._kept(key)) is not None:
            return kept
        async with self._sent("POST", path, body) as reply:
            found = _json(await reply.aread())
        costs = found.get("usage") or {}
        self.metrics.finished("stop", costs.get("prompt_tokens") or 0, costs.get("completion_tokens") or 0)
        if key is not None:
            await self.cache.set(key, json.dumps(found).encode())
        return found

    async def stream(self, path: str, body: Json) -> AsyncIterator[str]:
        """The events of a stream, each a text of JSON; whole streams of repeatable requests are kept."""
        key = self._key(path, body)
        if (kept := await self._kept(key)) is not None:
            for event in kept:
                yield event
            return
        events: list[str] = []
        began = last = time.perf_counter()
        async with self._sent("POST", path, body) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data:"):
                    continue
                event = line.removeprefix("data:").strip()
                if event == DONE:
                    break
                now = time.perf_counter()
                self.metrics.token(now - last) if events else self.metrics.first_token(now - began)
                last = now
                events.append(event)
                yield event
            else:
                raise ApiError(502, f"{self.settings.url} broke off its answer")
        self.metrics.finished("stop", 0, len(events))
        if key is not None and not any('"error"' in event for event in events):
            await self.cache.set(key, json.dumps(events).encode())

    def _key(self, path: str, body: Json) -> str | None:
        if self.cache is None or not (body.get("temperature") == 0 or body.get("seed") is not None):
            return None
        return key_of(self.settings.url, path, {k: v for k, v in body.items() if k != "user"})

    async def _kept(self, key: str | None) -> Json | list[str] | None:
        if key is None:
            return None
        contents = await self.cache.get(key)
        self.metrics.looked_up(found=contents is not None)
        return None if contents is None else json.loads(contents)

    @asynccontextmanager
    async def _sent(self, method: str, path: str, body: Mapping[str, object] | None) -> AsyncIterator[httpx.Response]:
        """The other server's answer, its body still to be read; ApiError if it is an error or does not come."""
        if self.n_running >= self.limits.queue_size:
            raise too_busy(1.0)
        self.n_running += 1
        try:
            async with self.client.stream(method, path, json=body) as reply:
                if reply.status_code >= 400:
                    raise _refused(reply, await reply.aread())
                yield reply
        except httpx.TimeoutException:
            raise ApiError(504, f"{self.settings.url} did not answer within {self.limits.timeout:g} seconds") from None
        except httpx.HTTPError as error:
            raise ApiError(502, f"{self.settings.url} cannot be reached ({type(error).__name__}: {error})") from None
        finally:
            self.n_running -= 1


def _json(content: bytes) -> Json:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ApiError(502, "the server behind this one did not answer in JSON")
    return found


def _refused(reply: httpx.Response, content: bytes) -> ApiError:
    """The other server's error in our shape; its own failures are 502 here, and its keys are not the client's business."""
    try:
        found = json.loads(content)
        detail = found.get("error", found)
        message, param = str(detail.get("message", detail)), detail.get("param")
    except (ValueError, AttributeError):
        message, param = f"status {reply.status_code}", None
    status = reply.status_code if reply.status_code not in (401, 403) and reply.status_code < 500 else 502
    again = reply.headers.get("retry-after")
    headers = {} if again is None else {"Retry-After": again}
    return ApiError(status, message, param=param if isinstance(param, str) else None, headers=headers)
