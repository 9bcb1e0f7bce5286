"""A map over worker processes whose results keep their order and whose queue stays short.

Chat templates are Python, which one core runs; tokenizers are Rust, which use all cores by themselves. So several
processes that render and tokenize each need a tokenizer of one thread.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from genai_pl.data.worker_start import end_with_run
from genai_pl.errors import ConfigError

Item, Result = TypeVar("Item"), TypeVar("Result")
AHEAD = 2  # items that wait for each process


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """`function` of each item, in their order; in this process where `processes` is 0.

    function: one that can be pickled. An error of an item is raised in its place; ConfigError where a process dies.
    """
    if not processes:
        yield from map(function, items)
        return
    from multiprocessing import get_context

    items = iter(items)
    with ProcessPoolExecutor(processes, mp_context=get_context(), initializer=_start) as pool:
        try:
            waiting = deque(pool.submit(function, item) for item in islice(items, processes * AHEAD))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
                yield result
        except BrokenProcessPool:
            raise ConfigError(
                f"encoders={processes}: a process was ended, perhaps for lack of memory; take fewer"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start() -> None:
    """End with the run, and let the tokenizer use one thread: the processes share the cores."""
    end_with_run()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
