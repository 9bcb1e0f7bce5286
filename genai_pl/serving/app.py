"""ASGI application: routes, middleware, and the lifespan from ready to drained."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from genai_pl.serving.errors import install
from genai_pl.serving.http.admin import admin_routes
from genai_pl.serving.http.anthropic import anthropic_routes
from genai_pl.serving.http.bodies import Bodies
from genai_pl.serving.http.label_routes import label_routes
from genai_pl.serving.http.native import plain_routes, state_routes
from genai_pl.serving.http.openai import openai_routes
from genai_pl.serving.http.proxy import proxy_routes
from genai_pl.serving.http.response_routes import response_routes
from genai_pl.serving.http.token_routes import token_routes
from genai_pl.serving.http.upstream import Upstream
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.middleware import Guard
from genai_pl.serving.rate_limits import RateLimits
from genai_pl.serving.service import Service
from genai_pl.serving.settings import Settings
from genai_pl.serving.shutdown import stop_in_time
from genai_pl.serving.tracing import Tracing

MIN_BODY_VALUES = 65_536  # JSON values that a body may always have: parsing them takes some milliseconds
REFRESH_SECONDS = 1.0  # between two updates of the gauges: queues, memory
MODEL_ROUTES = (plain_routes, openai_routes, response_routes, anthropic_routes, label_routes, token_routes)


def create_app(
    backend: Service | Upstream,
    settings: Settings,
    metrics: Metrics,
    keys: Sequence[str] = (),
    admin_keys: Sequence[str] = (),
    tracing: Tracing | None = None,
) -> FastAPI:
    """The FastAPI application in front of a model or of another server.

    backend: answers the routes; started and stopped with the application
    keys: accepted API keys; without any, requests need none
    admin_keys: accepted keys of the admin routes; without any, or without a folder to load from, there are none
    tracing: makes a span of each request; closed with the application

    Middleware runs outermost first: CORS, then Guard (request id, key, body, metrics), then FastAPI's error handlers.
    """
    lifespan = Lifespan(backend, settings, metrics, tracing)
    app = FastAPI(title="genai_pl", description="A language model.", lifespan=lifespan.run, redoc_url=None)
    install(app)
    if settings.adapters_root is None or not isinstance(backend, Service):
        admin_keys = ()
    routers = [state_routes(metrics, lifespan.refresh, lambda: lifespan.is_ready)]
    routers += _backend_routers(backend, has_admin=bool(admin_keys))
    for router in routers:
        app.include_router(router)
    # middleware; the last one added is the outermost
    app.add_middleware(
        Guard,
        metrics=metrics,
        keys=keys,
        admin_keys=admin_keys,
        bodies=_body_limits(settings),
        rates=backend.rates if isinstance(backend, Service) else RateLimits(settings.requests_per_minute, None),
        routes=[route for router in routers for route in router.routes],
        logs=settings.log_format == "json",
        tracing=tracing,
    )
    if settings.cors_origins:
        methods = ["GET", "POST", "DELETE"]
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=methods, allow_headers=["*"]
        )
    return app


class Lifespan:
    """The application from its start to its end: the backend, the gauges, and whether /ready answers 200.

    is_ready: True between the start of the backend and the begin of its stop
    """

    def __init__(
        self, backend: Service | Upstream, settings: Settings, metrics: Metrics, tracing: Tracing | None
    ) -> None:
        self.backend, self.settings, self.metrics, self.tracing = backend, settings, metrics, tracing
        self.is_ready = False

    def refresh(self) -> None:
        """Set the gauges."""
        self.metrics.refresh(self.backend.engine if isinstance(self.backend, Service) else self.backend)

    async def _refreshing(self) -> None:
        while True:
            self.refresh()
            await asyncio.sleep(REFRESH_SECONDS)

    @asynccontextmanager
    async def run(self, app: FastAPI) -> AsyncIterator[None]:
        """Context in which the application answers."""
        # start: the engine's thread, the signal handlers, then /ready answers 200
        self.backend.start()
        undo = stop_in_time(self.settings.drain, self.backend.give_up)
        self.is_ready = True
        task = asyncio.ensure_future(self._refreshing())
        try:
            yield
        finally:
            # stop: load balancers see /ready fail first; then what runs ends
            self.is_ready = False
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await self.backend.stop()
            if self.tracing is not None:
                await self.tracing.close()
            undo()
            gc.unfreeze()  # undoes worker.build: libraries check at exit which objects are left


def _backend_routers(backend: Service | Upstream, *, has_admin: bool) -> list[APIRouter]:
    """The routes of a model, perhaps with those that load adapters, or of another server."""
    if not isinstance(backend, Service):
        return [proxy_routes(backend)]
    return [routes(backend) for routes in (*MODEL_ROUTES, *([admin_routes] if has_admin else []))]


def _body_limits(settings: Settings) -> Bodies:
    """The limits of request bodies, in bytes and in JSON values."""
    max_values = max(MIN_BODY_VALUES, 2 * settings.limits.max_input_tokens)
    return Bodies(max_body=int(settings.limits.max_body_mib * 2**20), max_values=max_values)
