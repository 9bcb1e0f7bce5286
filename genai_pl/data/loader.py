"""Loaders whose order of batches can be stopped anywhere and resumed: it is a pure function of seed, epoch and position.

No iterator state is saved: a checkpoint holds epoch and rows, and the loader seeks there. The order does not depend on
the number of workers, and a step takes the same rows however it is split into ranks and accumulated batches, so a
run may be resumed with another split.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from genai_pl.data.packing import KeyedExamples
from genai_pl.data.worker_start import worker_start
from genai_pl.errors import DataError

Batch = dict[str, Tensor]
Collate = Callable[[list], Batch]


@dataclass(frozen=True)
class BatchPlan:
    """The split of training rows into steps, ranks and batches.

    batch_size: rows of one batch of one rank.
    accumulate: batches of a rank in an optimizer step.
    rank, world_size: this process and how many there are (data-parallel replicas).
    workers: worker processes of each rank.
    seed: of the order of rows.
    pin_memory: copy batches to page-locked memory, for asynchronous copies to a GPU.
    """

    batch_size: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    seed: int = 0
    pin_memory: bool = False


def with_window_targets(batches: Iterator[Batch], accumulate: int) -> Iterator[Batch]:
    """The batches with the number of targets of their whole optimizer step, `window_targets`.

    A loss that is a mean over tokens has to be divided by the tokens of the step, not by those of each accumulated batch,
    or batches with few targets would count too much. So the batches of a step (a window) are fetched before the first one
    is yielded. Batches that have `tokens`, a second count for another part of the loss, get `window_tokens` in the same way.
    """
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == accumulate:
            yield from _add_totals(window)
            window = []
    yield from _add_totals(window)


def _add_totals(window: list[Batch]) -> list[Batch]:
    """The batches of a window with the sums of their counts."""
    names = [name for name in ("targets", "tokens") if window and name in window[0]]
    totals = {f"window_{name}": sum((batch[name] for batch in window), torch.zeros(())) for name in names}
    return [{**batch, **totals} for batch in window]


def validation_batches(
    n_rows: int, batch_size: int, plan: BatchPlan, *, min_rows: int = 1
) -> list[list[tuple[int, int]]]:
    """Lists of (0, row number) that this rank validates on.

    Every rank has the same number of batches: sharded weights are gathered in each forward pass, so a rank with one batch
    more would wait for the others forever. A row too many joins the last batch instead. A batch has at least `min_rows`.
    """
    n_own, batch_size = n_rows // plan.world_size, max(batch_size, min_rows)  # rows that every rank has
    if n_own < min_rows:
        requirement = f", which need {min_rows} each" if min_rows > 1 else ""
        raise DataError(
            f"data.val_path, data.val_fraction: {n_rows} rows to validate on cannot be shared by {plan.world_size} "
            f"processes{requirement}; give more rows or raise data.val_fraction"
        )
    # rows are dealt in turn; the number of batches follows from the smallest share
    keys = [(0, row) for row in range(plan.rank, n_rows, plan.world_size)]
    n_batches = max(1, (n_own + batch_size - min_rows) // batch_size)
    batches = [keys[n * batch_size : (n + 1) * batch_size] for n in range(n_batches)]
    batches[-1] += keys[n_batches * batch_size :]
    return batches


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, row number) for one rank.

    Consecutive rows of the drawn order form a global batch of batch_size * world_size rows, of which a rank takes its
    slice. `epoch` and `first` are set before iteration; rows beyond the last full global batch are left out of the epoch.
    """

    def __init__(self, n_rows: int, plan: BatchPlan, *, shuffle: bool) -> None:
        self.n_rows, self.plan, self.shuffle = n_rows, plan, shuffle
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        return max(1, self.n_rows // (self.plan.batch_size * self.plan.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.epoch)
        rows = torch.randperm(self.n_rows, generator=generator) if self.shuffle else torch.arange(self.n_rows)
        size, world_size = self.plan.batch_size, self.plan.world_size
        for batch in range(self.first, len(self)):
            start = (batch * world_size + self.plan.rank) * size
            yield [(self.epoch, row) for row in rows[start : start + size].tolist()]


class EpochLoader:
    """One epoch of batches per `iter`, resumable by `state_dict` for any number of workers and ranks.

    rows: the training rows. collate: makes a batch of a list of rows. plan: this rank's share. shuffle: a new order
    every epoch.
    """

    def __init__(self, rows: Dataset, collate: Collate, plan: BatchPlan, *, shuffle: bool = True) -> None:
        if len(rows) < plan.world_size:
            raise DataError(f"data: {len(rows)} rows cannot be shared by {plan.world_size} processes")
        self.plan = plan
        # the sampler decides the order, the DataLoader fetches and collates in workers
        self.sampler = EpochSampler(len(rows), plan, shuffle=shuffle)
        self.loader = DataLoader(
            KeyedExamples(rows),
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=plan.workers,
            pin_memory=plan.pin_memory,
            persistent_workers=False,
            worker_init_fn=worker_start(),
            generator=torch.Generator().manual_seed(plan.seed),  # the default draws from the global generator
        )
        # the next `iter` begins epoch 0, or resumes where load_state_dict set it
        self.epoch, self.position = -1, 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # resume once, else begin the next epoch; a position at the end of an epoch is the start of the next
        self.epoch, self.position = self._resume or (self.epoch + 1, 0)
        self._resume = None
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
        self.sampler.epoch, self.sampler.first = self.epoch, self.position
        for batch in with_window_targets(iter(self.loader), self.plan.accumulate):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and the rows of it that all ranks together have taken."""
        per_batch = self.plan.batch_size * self.plan.world_size
        return {"epoch": self.epoch, "rows": self.position * per_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the data position of a resumed run; Lightning calls it when a checkpoint is loaded.

        The next `iter` continues after those rows; DataError if batches or steps of this size do not end there.
        """
        self._resume = (state["epoch"], batches_of(state["rows"], self.plan, n_batches=len(self)))


def batches_of(rows: int, plan: BatchPlan, *, n_batches: int) -> int:
    """The number of global batches that `rows` rows were; DataError if batches or steps of this size do not end there.

    n_batches: of the epoch, whose last step may be shorter.
    """
    per_batch = plan.batch_size * plan.world_size
    if rows % per_batch:
        raise DataError(
            f"data.batch_size: the checkpoint stands at row {rows} of its epoch, which batches of "
            f"{per_batch} rows do not reach; resume with the batch size and processes it was trained with"
        )
    position = rows // per_batch
    if position % plan.accumulate and position < n_batches:
        raise DataError(
            f"trainer.accumulate_grad_batches: the checkpoint stands at batch {position} of its epoch, which steps of "
            f"{plan.accumulate} batches do not reach; resume with what it was trained with"
        )
    return position
