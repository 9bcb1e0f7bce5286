"""What every request passes on its way in and out: a number, a key, its body, the count of its answer."""

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

OPEN = {"/", "/health", "/ready", "/metrics", "/openapi.json", "/docs"}  # without a key


class Guard:
    """The outermost layer: nothing but JSON errors leave it, whatever happens inside."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, keys: Sequence[str], bodies: Bodies) -> None:
        self.app = app
        self.metrics = metrics
        self.keys = [key.encode() for key in keys]
        self.bodies = bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
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
            CLIENT.set(self._client(scope))
            await self.app(scope, await self._with_body(scope, receive), counted)
        except ClientGone:
            status = CLIENT_GONE
        except asyncio.CancelledError:  # by the server, whose time to finish is over
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
        """Who asks, as far as it is known: the key, else the address; ApiError 401 without a key where one is asked for."""
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = authorization.partition(b" ")
        if self.keys and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            matches = [hmac.compare_digest(key.strip(), valid) for valid in self.keys]  # all: time tells nothing
            if kind.lower() != b"bearer" or not any(matches):
                raise ApiError(401, "give a key: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
            return hashlib.sha256(key.strip()).hexdigest()
        return network(scope["client"][0]) if scope.get("client") else ""

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with the whole body as its first message."""
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
    """The path of the route that answered; one name for all that do not exist, so that clients cannot make more."""
    route: BaseRoute | None = scope.get("route")
    return "other" if route is None else str(getattr(route, "path", "other"))
