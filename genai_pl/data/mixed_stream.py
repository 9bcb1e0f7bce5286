"""Batches of a mixture: rows of files by number and rows of streams in turn, in the order of one schedule.

Every worker of every rank follows the whole schedule (`Mixture`), which needs no reading, and builds the rows of its own
batches only. So the order does not depend on how many there are; where no source is a stream, a run may be resumed
with other workers, ranks and batch sizes. A stream is dealt to the workers as without a mixture.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch.utils.data import Dataset

from genai_pl.data.loader import Batch, BatchPlan, Collate, batches_of
from genai_pl.data.mixture import Draw, Mixture
from genai_pl.data.streaming import BatchStream, StreamReader
from genai_pl.objectives.collate import Example

log = logging.getLogger(__name__)

NUMBER = "source_number"  # key of the number of a row's source


class MixedStream(BatchStream):
    """An endless stream of (worker, state, batch) of a mixture; batches have `sources`, (B,) numbers.

    build_mixture: makes the schedule at its beginning. rows: the training rows of each source that is no stream, by number.
    streams: the others. collate: of the objective. plan: ranks, workers and batch size. n_batches: of the whole run.

    `progress` is the schedule after the last batch that was trained on.
    """

    def __init__(
        self,
        build_mixture: Callable[[], Mixture],
        rows: Mapping[int, Dataset],
        streams: Mapping[int, BatchStream],
        collate: Collate,
        plan: BatchPlan,
        *,
        n_batches: int,
    ) -> None:
        self.build_mixture, self.rows, self.streams, self.plan = build_mixture, rows, streams, plan
        self.collate = partial(with_sources, collate=collate)
        self.n_batches = n_batches
        self.progress = build_mixture()
        self.states: dict[int, dict] = {}
        self.first_worker = 0
        self._repeated: set[int] = set()  # sources of which a second pass has begun
        self._ended: set[int] = set()

    def batches(self, worker: int, n_workers: int, turn: int) -> Iterator[tuple[list[Example], dict]]:
        """Endlessly the rows of a batch of this worker, and the state after them; turn: batches of others that come first."""
        mixture = self.build_mixture()
        mixture.load_state_dict(self.progress.state_dict())
        # the worker's shares of the streams, where it left them
        share = self.plan.rank * n_workers + worker, self.plan.world_size * n_workers
        readers = {n: StreamReader(stream, share) for n, stream in self.streams.items()}
        for n, state in self.states.get(worker, {}).items():
            readers[n].load_state_dict(state)
        # of every global batch each rank has a slice, and of all batches each worker has its own
        size, per_batch = self.plan.batch_size, self.plan.batch_size * self.plan.world_size
        skipped = turn
        while True:
            for _ in range(skipped * per_batch):
                mixture.take()
            skipped = n_workers - 1
            draws = [mixture.take() for _ in range(per_batch)][self.plan.rank * size :][:size]
            rows = [self._row(draw, readers) for draw in draws]
            streams = {n: reader.state_dict() for n, reader in readers.items()}
            yield rows, {"mixture": mixture.state_dict(), "streams": streams}

    def _row(self, draw: Draw, readers: Mapping[int, StreamReader]) -> Example:
        """The row of a draw, with its source's number, which is part of its key."""
        if draw.source in readers:
            row = readers[draw.source].next_row()
            return {**row, "key": (draw.source, *row["key"]), NUMBER: draw.source}
        return {**self.rows[draw.source][draw.row], "key": tuple(draw), NUMBER: draw.source}

    def accept(self, worker: int, state: dict) -> None:
        """Take the state of a batch that was trained on; log the sources that begin again or end with it."""
        self.progress.load_state_dict(state["mixture"])
        if self.streams:
            self.states[worker] = state["streams"]
        for n in self._dry() - self._repeated:
            self._repeated.add(n)
            log.info("data        %s has run dry: it is repeated from here on", self._name(n))
        for n in self._over() - self._ended:
            self._ended.add(n)
            log.info("data        %s has ended: the others share its weight", self._name(n))

    def _name(self, n: int) -> str:
        return self.progress.plans[n].name

    def _dry(self) -> set[int]:
        """Sources of which some row was given twice; a stream is one that this process has read to its end."""
        files = {n for n in self.rows if self.progress.passes(n) > 1}
        return files | {n for state in self.states.values() for n, stream in state.items() if stream["begin"]["epoch"]}

    def _over(self) -> set[int]:
        """Sources that have ended by their number of epochs or cap."""
        return {n for n in range(len(self.progress.plans)) if self.progress.ended(n)}

    def state_dict(self) -> dict:
        """The schedule, and the place of each worker in the streams; without any the rows of all ranks so far."""
        state = {"workers": dict(self.states), "mixture": self.progress.state_dict()}
        return state if self.streams else {**state, "rows": sum(self.progress.rows)}

    def load_state_dict(self, state: dict) -> int:
        self.states = dict(state["workers"])
        self.progress.load_state_dict(state["mixture"])
        self._repeated, self._ended = self._dry(), self._over()
        if self.streams:
            return state["position"]
        return batches_of(state["rows"], self.plan, n_batches=self.n_batches)


def with_sources(rows: Sequence[Example], collate: Collate) -> Batch:
    """The batch of the rows with the number of each row's source, `sources` (B,)."""
    return {**collate(rows), "sources": torch.tensor([row[NUMBER] for row in rows])}
