"""Event loop probe: the longest time that one step of a server holds its event loop."""

import asyncio
import gc
import time

from starlette.types import ASGIApp, Receive, Scope, Send

PAUSE = 0.002


class Probed:
    """The application, beside which a clock runs.

    `worst` is the longest time in seconds that the clock stood still, `busy` the most seconds of CPU that the loop's
    thread took meanwhile, which do not depend on what else the machine does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.worst, self.busy = app, 0.0, 0.0

    def reset(self) -> None:
        """Forget the times measured so far."""
        gc.collect()
        gc.freeze()  # what tests have loaded before is not looked through in the middle of a measurement
        self.worst = self.busy = 0.0

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
            began, busy = time.perf_counter(), time.thread_time()
            await asyncio.sleep(PAUSE)
            self.worst = max(self.worst, time.perf_counter() - began - PAUSE)
            self.busy = max(self.busy, time.thread_time() - busy)
