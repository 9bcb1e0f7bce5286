"""Streaming: training rows from data larger than memory, read, tokenized, packed and shuffled on the way, exactly resumable.

Every worker of every rank iterates over the source and keeps each k-th document (its share), so workers need not
communicate. Shuffling is by blocks: a worker fills a block of rows, emits it in a random order, and fills the next. A
checkpoint holds where the block began (state of the source, of the packer, pending lines) and the position in it; the
block is read again on resume, which costs seconds and saves storing its rows. A resumed run thus sees the very same
batches, as long as the number of ranks and workers is the same.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from genai_pl.data.columns import Place, parse_text
from genai_pl.data.loader import Batch, BatchPlan, Collate, with_window_targets
from genai_pl.data.packing import Packer
from genai_pl.data.tokenize import CHUNK, chunk_encoder, encode_batch, find_split
from genai_pl.data.tokenizer import end_token
from genai_pl.data.worker_start import worker_start
from genai_pl.errors import CheckpointError, DataError
from genai_pl.objectives.collate import Example

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


LOOK_AHEAD = 1 << 13  # characters beyond a passage in which a place to split is searched


class BatchStream(IterableDataset):
    """An endless stream of (worker, state, batch); the state resumes the stream after the batch.

    source: documents with a column `text`. tokenizer, collate: as in training. plan: ranks, workers and batch size.
    build_packer: makes the packer of a worker.
    block_rows: rows that are shuffled together.
    continuous: the source yields the lines of one text instead of documents. They are joined into passages of many lines,
        split where no token changes, and share one segment.
    """

    def __init__(
        self,
        source: "datasets.IterableDataset",
        tokenizer: "PreTrainedTokenizerBase",
        collate: Collate,
        plan: BatchPlan,
        *,
        build_packer: Callable[[], Packer],
        block_rows: int,
        continuous: bool,
    ) -> None:
        self.source, self.tokenizer, self.collate, self.plan = source, tokenizer, collate, plan
        self.build_packer, self.block_rows = build_packer, block_rows
        self.continuous = continuous  # the source gives the lines of one text
        self.end = [] if continuous or end_token(tokenizer) is None else [end_token(tokenizer)]
        self.states: dict[int, dict] = {}
        self.first_worker = 0  # the worker that yields the next batch

    def __iter__(self) -> Iterator[tuple[int, dict, Batch | DataError]]:
        info = get_worker_info()
        n_workers, turn = (info.num_workers, info.id) if info else (1, 0)
        # after a resume the first batch must come from the worker whose turn it was
        worker = (turn + self.first_worker) % n_workers
        batches = self.batches(worker, n_workers, turn)
        while True:
            try:
                rows, state = next(batches)
            except DataError as error:  # as a value: raised in a worker, its message would be that process's traceback
                yield worker, {}, error
                return
            yield worker, state, self.collate(rows)

    def batches(self, worker: int, n_workers: int, turn: int) -> Iterator[tuple[list[Example], dict]]:
        """Endlessly the rows of a batch of this worker, and the state after them; turn: batches of others that come first."""
        stream = StreamReader(self, (self.plan.rank * n_workers + worker, self.plan.world_size * n_workers))
        if worker in self.states:
            stream.load_state_dict(self.states[worker])
        while True:
            yield [stream.next_row() for _ in range(self.plan.batch_size)], stream.state_dict()

    def accept(self, worker: int, state: dict) -> None:
        """Take the state of a batch that was trained on as that of its worker."""
        self.states[worker] = state

    def state_dict(self) -> dict:
        """The state of each worker after its last accepted batch."""
        return {"workers": dict(self.states)}

    def load_state_dict(self, state: dict) -> int:
        """Continue after a `state_dict` of a loader; returns the batches that were yielded."""
        self.states = dict(state["workers"])
        return state["position"]


class StreamReader:
    """The share of one worker: an endless sequence of rows.

    epoch, n_seen: passes over the source, and documents seen in this one. block, position: the block and the rows of it
    that were emitted. pending: lines that were read and belong to the next passage.
    """

    def __init__(self, data: BatchStream, share: tuple[int, int]) -> None:
        self.data, self.share = data, share
        self.packer = data.build_packer()
        self.epoch, self.block, self.position, self.n_seen = 0, 0, 0, 0
        self.rows: list[Example] = []
        self.order: list[int] = []
        self.pending = ""
        self.block_start = self._mark()
        self.documents = self._read()

    def next_row(self) -> Example:
        """The next row of the shuffled block, with its key; fills a block when the last one is empty."""
        if self.position >= len(self.order):
            self.block += bool(self.order)
            self.position = 0
            self._fill()
        row = self.rows[self.order[self.position]]
        self.position += 1
        return {**row, "key": (self.share[0], self.block * 1_000_003 + self.position)}

    def state_dict(self) -> dict:
        """Where the block began, its number, and how many of its rows were emitted."""
        return {"begin": self.block_start, "block": self.block, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Read the block again from its beginning and continue at the position."""
        self.block_start, self.block = state["begin"], state["block"]
        self.epoch, self.n_seen = self.block_start["epoch"], self.block_start["seen"]
        if "held" not in self.block_start:
            raise CheckpointError("resume: this stream was left by an older version, which dealt the text otherwise")
        self.pending = self.block_start["held"]
        self.packer.load_state_dict(self.block_start["packer"])
        self.documents = self._read(self.block_start["source"])
        self._fill()
        self.position = state["position"]

    def _mark(self) -> dict:
        """Everything that the stream depends on at the beginning of a block."""
        return {
            "epoch": self.epoch,
            "seen": self.n_seen,
            "held": self.pending,
            "packer": self.packer.state_dict(),
            "source": self.data.source.state_dict(),
        }

    def _fill(self) -> None:
        """Read, tokenize and pack documents until the block is full, and draw its order."""
        self.block_start = self._mark()
        self.rows = []
        while len(self.rows) < self.data.block_rows:
            batch = encode_batch({"text": [next(self.documents)]}, self.data.tokenizer, self.data.end)
            self.rows += self.packer.push(batch["input_ids"][0], ends=not self.data.continuous)
        seed = self.data.plan.seed * 1_000_003 + self.block * 1_009 + self.share[0]
        self.order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()

    def _read(self, state: dict | None = None) -> Iterator[str]:
        """The texts of this share, endlessly, from `state` of the source on."""
        index, count = self.share
        while True:
            self.data.source.set_epoch(self.epoch)
            has_text = state is not None  # a resumed pass may have had text before
            if state is not None:
                self.data.source.load_state_dict(state)
                state = None
            for text in self._passages() if self.data.continuous else self._texts():
                self.n_seen += 1
                if (self.n_seen - 1) % count == index:
                    has_text = has_text or bool(text)
                    yield text
            self._check(has_text)
            self.epoch, self.n_seen = self.epoch + 1, 0

    def _check(self, has_text: bool) -> None:
        """DataError after a pass in which this share had no text: every further pass would be empty, too."""
        index, count = self.share
        units = "passages" if self.data.continuous else "documents"
        if not self.n_seen:
            raise DataError("data.path: no document in it")
        if self.n_seen <= index:
            raise DataError(
                f"data.workers={self.data.plan.workers}: the stream has {self.n_seen} {units}, too few for {count} workers "
                f"({self.data.plan.world_size} processes); lower data.workers or set data.streaming=false"
            )
        if not has_text:
            raise DataError(f"data.path: there is no text in the {units} of worker {index + 1} of {count}")

    def _texts(self) -> Iterator[str]:
        """The documents or lines of the source, in order."""
        # batches of one: a plain loop would divide the files among the workers once more
        for number, batch in enumerate(self.data.source.iter(batch_size=1), start=self.n_seen + 1):
            yield parse_text(batch["text"][0], Place("data.path", number, "text"))

    def _passages(self) -> Iterator[str]:
        """Lines joined to about CHUNK characters, split where that changes no token if there is such a place."""
        encode = chunk_encoder(self.data.tokenizer)
        n_pending = len(self.pending)
        lines = [self.pending]
        for line in self._texts():
            lines.append(line)
            n_pending += len(line)
            # collect enough lines to search for a split after CHUNK characters
            if n_pending < CHUNK + LOOK_AHEAD:
                continue
            text = "".join(lines)
            # a split that changes no token, else any line end, else all; the rest begins the next passage
            split = find_split(text, CHUNK, encode) or text.find("\n", CHUNK) + 1 or len(text)
            self.pending = text[split:]
            lines, n_pending = [self.pending], len(text) - split
            yield text[:split]
        self.pending = ""
        # the source is exhausted: its last lines are the last passage
        if n_pending:
            yield "".join(lines)


def _as_it_is(batch: object) -> object:
    """The batch, which the stream has collated; the default would make tensors of the arrays of prompts."""
    return batch


class StreamLoader:
    """`n_batches` batches of an endless stream, or of a mixture with streams; the state is that of every worker.

    rows: the stream. n_batches: of the whole run, those before a resume included.
    """

    def __init__(self, rows: BatchStream, n_batches: int) -> None:
        self.rows, self.n_batches = rows, n_batches
        self.position = 0

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        plan = self.rows.plan
        workers = max(1, plan.workers)
        # workers take turns, so the position determines which one is next
        self.rows.first_worker = self.position % workers
        loader = DataLoader(
            self.rows,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=plan.workers,
            worker_init_fn=worker_start(),
            generator=torch.Generator().manual_seed(plan.seed),
        )
        states: list[tuple[int, dict]] = []

        # keep the state of each batch until the batch is yielded below
        def batches() -> Iterator[Batch]:
            for worker, state, batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                states.append((worker, state))
                yield batch

        for batch in with_window_targets(batches(), plan.accumulate):
            # the batches of a step are fetched together: only those that were yielded count
            self.rows.accept(*states.pop(0))
            self.position += 1
            yield batch
            if self.position >= self.n_batches:
                return

    def state_dict(self) -> dict:
        """The number of batches that were yielded, and the state of the stream after them."""
        return {"position": self.position, **self.rows.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Set the data position of a resumed run; Lightning calls it when a checkpoint is loaded.

        The next `iter` continues after those batches.
        """
        self.position = self.rows.load_state_dict(state)
