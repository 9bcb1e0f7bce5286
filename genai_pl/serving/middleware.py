"""Middleware of every request: request id, API key, body limits, and the metrics of the answer."""

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genai_pl.serving.adapters import IN_USE, InUse
from genai_pl.serving.errors import (
    ANTHROPIC_PATH,
    CLIENT_GONE,
    IS_ANTHROPIC,
    REQUEST,
    ApiError,
    ClientGone,
    unexpected,
)
from genai_pl.serving.fair_queue import CLIENT, network
from genai_pl.serving.http.bodies import RESERVED_BYTES, Bodies
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.rate_limits import RateLimits
from genai_pl.serving.tracing import Tracing

OWN_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")  # ids of clients: nothing that could forge a line of the log
access = logging.getLogger("genai_pl.access")
ADMIN_PATH = "/admin/"
OPEN = {"/", "/health", "/ready", "/metrics", "/openapi.json", "/docs"}  # paths that need no key


class Guard:
    """ASGI middleware in front of the routes; whatever fails inside, the client gets an error in JSON.

    app: the application inside
    metrics: counts route, status and seconds of each request
    keys: accepted API keys; empty for none
    admin_keys: keys of the paths below ADMIN_PATH, which no other key opens; empty where there are no such routes
    bodies: limits of request bodies, which are read completely before the application starts
    rates: limits of requests and tokens a minute, which requests that ask for work (POST) are counted by
    routes: those of the application, for the names of requests that are refused before it
    logs: a line in the log for each request
    tracing: makes a span of each request, None for none

    Each request gets an id (`x-request-id`, the client's own if it sends one, and REQUEST for the log) and a client (CLIENT),
    whose turns it takes: the hash of its key, else its address.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        keys: Sequence[str],
        bodies: Bodies,
        rates: RateLimits,
        routes: Sequence[BaseRoute] = (),
        admin_keys: Sequence[str] = (),
        logs: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.keys, self.admin_keys = ([key.encode() for key in each] for each in (keys, admin_keys))
        self.bodies, self.rates, self.logs, self.tracing = bodies, rates, logs, tracing
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # context of the request, which tasks started for it inherit
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        number = given.decode() if OWN_ID.fullmatch(given) else uuid.uuid4().hex[:12]
        REQUEST.set(number)
        IS_ANTHROPIC.set(scope["path"].startswith(ANTHROPIC_PATH))
        RESERVED_BYTES.set([])
        adapters = InUse()
        IN_USE.set(adapters)
        trace = None if self.tracing is None else self.tracing.begin(scope, number)
        start, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", number.encode())]}
            await send(message)

        try:
            # key, body, application
            CLIENT.set(self._client(scope))
            if scope["method"] == "POST":
                self.rates.admit()
            await self.app(scope, await self._with_body(scope, receive), counted)
        except ClientGone:
            status = CLIENT_GONE
        except asyncio.CancelledError:  # by uvicorn, at the end of the time to drain
            if not status:
                stopping = ApiError(503, "the server is stopping", headers={"Retry-After": "5"})
                await stopping.response()(scope, receive, counted)
        except Exception as error:
            answer = error if isinstance(error, ApiError) else unexpected(error)
            if not status:
                await answer.response()(scope, receive, counted)
        finally:
            self.bodies.release()
            adapters.release()
            seconds, route, status = time.perf_counter() - start, route_name(scope, self.routes), status or CLIENT_GONE
            self.metrics.answered(route, status, seconds)
            if trace is not None:
                self.tracing.end(trace, route, status)
            if self.logs:
                fields = {"method": scope["method"], "route": route, "status": status}
                access.info("request", extra={"fields": {**fields, "seconds": round(seconds, 4)}})

    def _client(self, scope: Scope) -> str:
        """The client of a request: the hash of its key, else its address; ApiError 401 if a key is needed and not valid."""
        headers = dict(scope["headers"])
        # Authorization: Bearer KEY, or Anthropic's x-api-key: KEY
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if not key and b"x-api-key" in headers:
            kind, key = b"bearer", headers[b"x-api-key"]
        is_admin = bool(self.admin_keys) and scope["path"].startswith(ADMIN_PATH)
        keys = self.admin_keys if is_admin else self.keys
        if keys and scope["path"] not in OPEN and (is_admin or scope["method"] != "OPTIONS"):
            matches = [hmac.compare_digest(key.strip(), valid) for valid in keys]  # compare with all: no timing
            if kind.lower() != b"bearer" or not any(matches):
                raise ApiError(401, "give a key: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
            return hashlib.sha256(key.strip()).hexdigest()
        return network(scope["client"][0]) if scope.get("client") else ""

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """A `receive` whose first message is the whole body, and whose later ones are the server's (disconnects)."""
        body = await self.bodies.read(receive, dict(scope["headers"]).get(b"content-length", b"0"))
        first = True

        async def replay() -> Message:
            nonlocal first
            if not first:
                return await receive()
            first = False
            return {"type": "http.request", "body": body, "more_body": False}

        return replay


def route_name(scope: Scope, routes: Sequence[BaseRoute] = ()) -> str:
    """The path pattern of the route that answered, or would have: "other" for unknown paths, as clients must not create labels.

    routes: looked through for a request that was refused before the application chose its route
    """
    route: BaseRoute | None = scope.get("route")
    if route is None:
        route = next((one for one in routes if one.matches(scope)[0] is Match.FULL), None)
    return "other" if route is None else str(getattr(route, "path", "other"))
