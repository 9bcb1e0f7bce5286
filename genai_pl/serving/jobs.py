"""Work for the thread that owns the model, handed in by others."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future


class Jobs:
    """What waits to be done, the oldest first; whoever handed it in gets what it gives or raises."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Future, Callable[[], object]]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, work: Callable[[], object]) -> Future:
        """What will come of it."""
        future: Future = Future()
        self._waiting.append((future, work))
        return future

    def do_next(self) -> None:
        """Do the oldest, if somebody still waits for it."""
        future, work = self._waiting.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    def cancel(self) -> None:
        """Do none of them."""
        while self._waiting:
            self._waiting.popleft()[0].cancel()
