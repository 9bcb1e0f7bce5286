"""How long the event loop of a server does nothing else."""

import asyncio
import gc
import time

from starlette.types import ASGIApp, Receive, Scope, Send

PAUSE = 0.002


class Probed:
    """The application, beside which a clock runs; `worst` is the longest time in seconds that it stood still."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.worst = app, 0.0

    def reset(self) -> None:
        """Begin again."""
        gc.collect()
        gc.freeze()  # what tests have loaded before is not looked through in the middle of a measurement
        self.worst = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        clock = asyncio.ensure_future(self._watch())
        try:
            await self.app(scope, receive, send)
        finally:
            clock.cancel()
            gc.unfreeze()

    async def _watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(PAUSE)
            self.worst = max(self.worst, time.perf_counter() - began - PAUSE)
