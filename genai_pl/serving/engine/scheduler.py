"""How an engine reads prompts: a chunk of a long one between two steps, or several short ones in one pass."""

import logging
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from genai_pl.serving.engine.request_state import Row, ending_alone, n_together, read_whole, share_cache

if TYPE_CHECKING:
    from genai_pl.serving.engine.engine import Engine

log = logging.getLogger("genai_pl.serving")
SPARE = 4  # slots to one spare place


def read_prompts(engine: "Engine") -> None:
    """Read prompts, at most a chunk of tokens in all; what is read to its end has its first token and joins the batch."""
    left = engine.chunk
    while left > 0 and _next(engine, left):
        rows, before = list(engine.reading), sum(row.n_read for row in engine.reading)
        try:
            engine.adapters.choose([rows[0].request.adapter])
            logits = read_whole(rows, engine.device) if len(rows) > 1 else rows[0].read(left, engine.device)
            left -= sum(row.n_read for row in rows) - before
            if logits is None:
                engine.resting.append(rows[0])
                engine.reading = []
                continue
            engine.take(logits, rows)
            _join(engine, rows)
        except Exception:
            log.exception("a prompt cannot be read: its answer ends")
            _fail(engine)
        engine.reading = []


def _next(engine: "Engine", left: int) -> bool:
    """Whether there are rows to read now: newcomers and those that are read in part take turns."""
    is_newcomers_turn, engine.is_newcomers_turn = engine.is_newcomers_turn, not engine.is_newcomers_turn
    if is_newcomers_turn and _admit(engine, left):
        return True
    if engine.resting:
        engine.reading = [engine.resting.popleft()]
        return True
    return not is_newcomers_turn and _admit(engine, left)


def _join(engine: "Engine", rows: list[Row]) -> None:
    """Let rows that are read take part in steps, unless they are over."""
    for row in rows:
        if row.ending is None:
            engine.batch.join(row)
        else:
            engine.end(row)
        engine.reading.remove(row)


def _admit(engine: "Engine", left: int) -> bool:
    """Whether the next request has begun to be read, with others whose prompts are read in the same pass."""
    engine.reading = engine.next_rows(lambda: _admitted(engine, left if engine.batch.packs else 0))
    if not engine.reading:
        return False
    try:
        engine.adapters.choose([engine.reading[0].request.adapter])  # virtual tokens have room where they are on
        for row in list(engine.reading):
            _open(engine, row)
        if engine.reading:
            several, first = len(engine.reading) > 1, engine.reading[0]
            n_tokens = sum(len(row.prompt) for row in engine.reading)
            share_cache(engine.reading, n_tokens if several else engine.batch.room(first, engine.max_length))
            return True
    except Exception:
        log.exception("a request cannot begin")
        _fail(engine)
    return _admit(engine, left)


def _admitted(engine: "Engine", limit: int) -> list[Row]:
    """Those that begin now: as many as slots are free, or one that has a spare place when none is."""
    rows, free = eligible(engine), engine.slots - engine.n_running
    if free > 0:
        return rows[: n_together(rows, free, limit)]
    if engine.n_running >= engine.places:
        return []
    return [row for row in rows if needs_spare(engine, row)][:1]


def spare_places(slots: int) -> int:
    """How many rows there may be beyond the slots."""
    return -(-slots // SPARE)


def needs_spare(engine: "Engine", row: Row) -> bool:
    """Whether a row may have a spare place: nothing runs for its client, or for its request, which is over by the time
    that a slot is free."""
    running = engine.running()
    if all(row.request.client != other.request.client for other in running):
        return True
    if row.request.group is not None and any(row.request.group is other.request.group for other in running):
        return False
    return row.config.max_new_tokens < min(other.n_unwritten for other in running)


def eligible(engine: "Engine") -> list[Row]:
    """Those that wait, in the order of their turns.

    Of one client's, what has less for its request comes first: one with many prompts is read beside others, not before.
    """
    running = Counter(id(row.request.group) for row in engine.running())
    waiting, ranks, lines = list(engine.waiting), {}, defaultdict(list)
    for row in waiting:
        group = id(row.request.group)
        ranks[id(row)] = 0 if row.request.group is None else running[group]
        running[group] += 1
        lines[row.request.client].append(row)
    turns = {client: iter(sorted(line, key=lambda row: ranks[id(row)])) for client, line in lines.items()}
    return [next(turns[row.request.client]) for row in waiting]


def _open(engine: "Engine", row: Row) -> None:
    """Get a row ready, or end it."""
    engine.observer.started(time.monotonic() - row.submitted)
    with ending_alone(row):
        row.open(engine.model, engine.tokenizer, engine.device)
    if row.ending:
        engine.reading.remove(row)
        engine.end(row)


def _fail(engine: "Engine") -> None:
    for row in engine.reading:
        engine.end(row, "error")
    engine.reading = []
