"""ASGI application: routes, middleware, and the lifespan from ready to drained."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
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
    is_ready = False

    def refresh() -> None:
        metrics.refresh(backend.engine if isinstance(backend, Service) else backend)

    async def refreshing() -> None:
        while True:
            refresh()
            await asyncio.sleep(REFRESH_SECONDS)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        nonlocal is_ready
        # start: the engine's thread, the signal handlers, then /ready answers 200
        backend.start()
        undo = stop_in_time(settings.drain, backend.give_up)
        is_ready = True
        task = asyncio.ensure_future(refreshing())
        try:
            yield
        finally:
            # stop: load balancers see /ready fail first; then what runs ends
            is_ready = False
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await backend.stop()
            if tracing is not None:
                await tracing.close()
            undo()
            gc.unfreeze()  # undoes worker.build: libraries check at exit which objects are left

    # routes
    app = FastAPI(title="genai_pl", description="A language model.", lifespan=life, redoc_url=None)
    install(app)
    app.include_router(state_routes(metrics, refresh, lambda: is_ready))
    if isinstance(backend, Service):
        for routes in MODEL_ROUTES:
            app.include_router(routes(backend))
        if settings.adapters_root is None:
            admin_keys = ()
        elif admin_keys:
            app.include_router(admin_routes(backend))
    else:
        app.include_router(proxy_routes(backend))
    # middleware; the last one added is the outermost
    limits = settings.limits
    bodies = Bodies(
        max_body=int(limits.max_body_mib * 2**20), max_values=max(MIN_BODY_VALUES, 2 * limits.max_input_tokens)
    )
    rates = backend.rates if isinstance(backend, Service) else RateLimits(settings.requests_per_minute, None)
    logs = settings.log_format == "json"
    options = {"bodies": bodies, "rates": rates, "logs": logs, "tracing": tracing}
    app.add_middleware(Guard, metrics=metrics, keys=keys, admin_keys=admin_keys, **options)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    return app
