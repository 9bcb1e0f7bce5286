"""Thread queue: work of other threads that the engine's thread runs between two of its steps."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class ThreadQueue:
    """First-in first-out queue of callables; each caller holds the Future of its result.

    PyTorch modules are not safe to call from two threads while adapters are switched on and off in them, so other
    threads hand in a callable instead of taking a lock on the model: the engine decides when it runs.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future, Callable[[], object]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, work: Callable[[], object]) -> Future:
        """Future of the work's result or exception; cancelling the future before its turn drops the work."""
        future: Future = Future()
        self._waiting.append((future, work))
        return future

    def run_next(self) -> None:
        """Run the oldest callable in the calling thread, unless its future was cancelled; an exception goes to the future."""
        future, work = self._waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    def cancel(self) -> None:
        """Cancel all futures that have not run."""
        while self._waiting:
            self._waiting.popleft()[0].cancel()
