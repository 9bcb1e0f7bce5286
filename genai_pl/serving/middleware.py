"""Middleware of every request: request id, API key, body limits, and the metrics of the answer."""

import asyncio
import hashlib
import hmac
import time
import uuid
from collections.abc import Sequence

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genai_pl.serving.errors import CLIENT_GONE, REQUEST, ApiError, ClientGone, unexpected
from genai_pl.serving.fair_queue import CLIENT, network
from genai_pl.serving.http.bodies import RESERVED_BYTES, Bodies
from genai_pl.serving.metrics import Metrics

OPEN = {"/", "/health", "/ready", "/metrics", "/openapi.json", "/docs"}  # paths that need no key


class Guard:
    """ASGI middleware in front of the routes; whatever fails inside, the client gets an error in JSON.

    app: the application inside
    metrics: counts route, status and seconds of each request
    keys: accepted API keys; empty for none
    bodies: limits of request bodies, which are read completely before the application starts

    Each request gets an id (`x-request-id`, and REQUEST for the log) and a client (CLIENT), whose turns it takes: the hash of
    its key, else its address.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, keys: Sequence[str], bodies: Bodies) -> None:
        self.app = app
        self.metrics = metrics
        self.keys = [key.encode() for key in keys]
        self.bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # context of the request, which tasks started for it inherit
        number = uuid.uuid4().hex[:12]
        REQUEST.set(number)
        RESERVED_BYTES.set([])
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
            self.metrics.answered(route_name(scope), status or CLIENT_GONE, time.perf_counter() - start)

    def _client(self, scope: Scope) -> str:
        """The client of a request: the hash of its key, else its address; ApiError 401 if a key is needed and not valid."""
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = authorization.partition(b" ")
        if self.keys and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            matches = [hmac.compare_digest(key.strip(), valid) for valid in self.keys]  # compare with all: no timing
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


def route_name(scope: Scope) -> str:
    """The path pattern of the route that answered, "other" for unknown paths: clients must not create metric labels."""
    route: BaseRoute | None = scope.get("route")
    return "other" if route is None else str(getattr(route, "path", "other"))
