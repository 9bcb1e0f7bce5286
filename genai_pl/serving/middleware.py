"""What every request passes on its way in and out: a key, the size of its body, the count of its answer."""

import asyncio
import hmac
import time
from collections.abc import Sequence

from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genai_pl.serving.errors import CLIENT_GONE, ApiError, ClientGone, unexpected
from genai_pl.serving.metrics import Metrics

OPEN = {"/", "/health", "/ready", "/metrics", "/openapi.json", "/docs"}  # without a key
BODY_SECONDS = 30.0  # for a body to arrive


class Guard:
    """The outermost layer: nothing but JSON errors leave it, whatever happens inside."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, keys: Sequence[str], max_body: int) -> None:
        self.app = app
        self.metrics = metrics
        self.keys = [key.encode() for key in keys]
        self.max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            await self.app(scope, await self._with_body(scope, receive), counted)
        except ClientGone:
            status = CLIENT_GONE
        except Exception as error:
            answer = error if isinstance(error, ApiError) else unexpected(error)
            if not status:
                await answer.response()(scope, receive, counted)
        finally:
            self.metrics.answered(route_name(scope), status or CLIENT_GONE, time.perf_counter() - began)

    def _check_key(self, scope: Scope) -> None:
        if not self.keys or scope["path"] in OPEN or scope["method"] == "OPTIONS":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        right = [hmac.compare_digest(key.strip(), known) for known in self.keys]  # all, so that time tells nothing
        if kind.lower() != b"bearer" or not any(right):
            raise ApiError(401, "give a key: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` with the whole body as its first message; ApiError where that is too large or does not come."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
        first = True

        async def replay() -> Message:
            nonlocal first
            if not first:
                return await receive()
            first = False
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.max_body:,} bytes (option max_body_mib)")


def route_name(scope: Scope) -> str:
    """The path of the route that answered; one name for all that do not exist, so that clients cannot make more."""
    route: BaseRoute | None = scope.get("route")
    return "other" if route is None else str(getattr(route, "path", "other"))
