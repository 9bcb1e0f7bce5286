"""Training rows from data that is larger than memory: read, tokenized, packed and shuffled as they come, exactly resumable."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from genai_pl.data.columns import Place, parse_text
from genai_pl.data.loader import Batch, BatchPlan, Collate, with_window_targets
from genai_pl.data.packing import Packer
from genai_pl.data.tokenize import CHUNK, chunk_encoder, encode_batch, find_split
from genai_pl.data.tokenizer import end_token
from genai_pl.errors import CheckpointError, DataError
from genai_pl.objectives.collate import Example
from genai_pl.signals import outlive_signals

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


LOOK_AHEAD = 1 << 13  # characters beyond a passage in which a place to cut is sought


class BatchStream(IterableDataset):
    """An endless stream of batches, each with the state from which the stream goes on after it.

    Documents are dealt in turn to the workers of all ranks; of a text that is read line by line (`continuous`), passages of
    many lines, which have the tokens that they have in the whole. Rows are shuffled within blocks of `block_rows`: a block is
    filled from the source, emptied in a drawn order, and only its beginning and the position in it are remembered.
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
        self.first = 0  # the worker whose turn it is

    def __iter__(self) -> Iterator[tuple[int, dict, Batch | DataError]]:
        info = get_worker_info()
        n_workers, worker = (info.num_workers, info.id) if info else (1, 0)
        worker = (worker + self.first) % n_workers
        share = self.plan.rank * n_workers + worker, self.plan.world_size * n_workers
        stream = _WorkerStream(self, share)
        if worker in self.states:
            stream.load_state_dict(self.states[worker])
        while True:
            try:
                rows = [stream.next_row() for _ in range(self.plan.batch_size)]
            except DataError as error:  # as a value: raised in a worker it would come with the trace of that process
                yield worker, {}, error
                return
            yield worker, stream.state_dict(), self.collate(rows)


class _WorkerStream:
    """One worker's share of the stream."""

    def __init__(self, data: BatchStream, share: tuple[int, int]) -> None:
        self.data, self.share = data, share
        self.packer = data.build_packer()
        self.epoch, self.block, self.position, self.seen = 0, 0, 0, 0
        self.rows: list[Example] = []
        self.order: list[int] = []
        self.held = ""  # lines that were read and belong to the next passage
        self.begin = self._mark()
        self.documents = self._read()

    def next_row(self) -> Example:
        """The next row of the drawn order; fills the next block when this one is used up."""
        if self.position >= len(self.order):
            self.block += bool(self.order)
            self.position = 0
            self._fill()
        row = self.rows[self.order[self.position]]
        self.position += 1
        return {**row, "key": (self.share[0], self.block * 1_000_003 + self.position)}

    def state_dict(self) -> dict:
        """Where the block began, which one it is, and how many of its rows are gone."""
        return {"begin": self.begin, "block": self.block, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Read the block again from its beginning and go on in it."""
        self.begin, self.block = state["begin"], state["block"]
        self.epoch, self.seen = self.begin["epoch"], self.begin["seen"]
        if "held" not in self.begin:
            raise CheckpointError("resume: this stream was left by an older version, which dealt the text otherwise")
        self.held = self.begin["held"]
        self.packer.load_state_dict(self.begin["packer"])
        self.documents = self._read(self.begin["source"])
        self._fill()
        self.position = state["position"]

    def _mark(self) -> dict:
        return {
            "epoch": self.epoch,
            "seen": self.seen,
            "held": self.held,
            "packer": self.packer.state_dict(),
            "source": self.data.source.state_dict(),
        }

    def _fill(self) -> None:
        self.begin = self._mark()
        self.rows = []
        while len(self.rows) < self.data.block_rows:
            batch = encode_batch({"text": [next(self.documents)]}, self.data.tokenizer, self.data.end)
            self.rows += self.packer.push(batch["input_ids"][0], ends=not self.data.continuous)
        seed = self.data.plan.seed * 1_000_003 + self.block * 1_009 + self.share[0]
        self.order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(seed)).tolist()

    def _read(self, state: dict | None = None) -> Iterator[str]:
        index, count = self.share
        while True:
            self.data.source.set_epoch(self.epoch)
            says = state is not None  # of a pass that goes on nobody knows what was said before
            if state is not None:
                self.data.source.load_state_dict(state)
                state = None
            for text in self._passages() if self.data.continuous else self._texts():
                self.seen += 1
                if (self.seen - 1) % count == index:
                    says = says or bool(text)
                    yield text
            self._check(says)
            self.epoch, self.seen = self.epoch + 1, 0

    def _check(self, says: bool) -> None:
        """DataError after a pass that gave this share nothing to train on, since others would give it nothing either."""
        index, count = self.share
        what = "passages" if self.data.continuous else "documents"
        if not self.seen:
            raise DataError("data.path: no document in it")
        if self.seen <= index:
            raise DataError(
                f"data.workers={self.data.plan.workers}: the stream has {self.seen} {what}, too few for {count} workers "
                f"({self.data.plan.world_size} processes); lower data.workers or set data.streaming=false"
            )
        if not says:
            raise DataError(f"data.path: there is no text in the {what} of worker {index + 1} of {count}")

    def _texts(self) -> Iterator[str]:
        # in batches of one: a plain loop would deal the files to the workers a second time
        for number, batch in enumerate(self.data.source.iter(batch_size=1), start=self.seen + 1):
            yield parse_text(batch["text"][0], Place("data.path", number, "text"))

    def _passages(self) -> Iterator[str]:
        """Lines together, about CHUNK characters, cut where that changes no token if there is such a place."""
        encode = chunk_encoder(self.data.tokenizer)
        n_held = len(self.held)
        lines = [self.held]
        for line in self._texts():
            lines.append(line)
            n_held += len(line)
            if n_held < CHUNK + LOOK_AHEAD:
                continue
            text = "".join(lines)
            cut = find_split(text, CHUNK, encode) or text.find("\n", CHUNK) + 1 or len(text)
            self.held = text[cut:]
            lines, n_held = [self.held], len(text) - cut
            yield text[:cut]
        self.held = ""
        if n_held:
            yield "".join(lines)


class StreamLoader:
    """`n_batches` batches of an endless stream; the state is every worker's own."""

    def __init__(self, rows: BatchStream, n_batches: int) -> None:
        self.rows, self.n_batches = rows, n_batches
        self.position = 0

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[Batch]:
        plan = self.rows.plan
        workers = max(1, plan.workers)
        self.rows.first = self.position % workers
        loader = DataLoader(
            self.rows,
            batch_size=None,
            num_workers=plan.workers,
            worker_init_fn=outlive_signals,
            generator=torch.Generator().manual_seed(plan.seed),
        )
        states: list[tuple[int, dict]] = []

        def batches() -> Iterator[Batch]:
            for worker, state, batch in loader:
                if isinstance(batch, DataError):
                    raise batch
                states.append((worker, state))
                yield batch

        for batch in with_window_targets(batches(), plan.accumulate):
            # a step's batches are fetched ahead of their use: only what was handed out counts
            worker, state = states.pop(0)
            self.rows.states[worker] = state
            self.position += 1
            yield batch
            if self.position >= self.n_batches:
                return

    def state_dict(self) -> dict:
        """Batches handed out, and for each worker where its share goes on."""
        return {"position": self.position, "workers": dict(self.rows.states)}

    def load_state_dict(self, state: dict) -> None:
        """The next `iter` goes on there."""
        self.position, self.rows.states = state["position"], dict(state["workers"])
