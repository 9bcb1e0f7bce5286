"""The base of all data modules: loaders with a resumable order, and a validation set in fixed order.

A subclass reads and tokenizes in `prepare` and leaves `train_rows` and `val_rows`; batches, ranks, workers and resuming
are the same for every kind of data.
"""

from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from genai_pl.data.loader import BatchPlan, Collate, EpochLoader, validation_batches
from genai_pl.data.packing import KeyedExamples
from genai_pl.data.tokenizer import train_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowsDataModule(L.LightningDataModule):
    """Training and validation batches of `train_rows` and `val_rows`, which `prepare` of a subclass sets.

    seq_len: tokens that the model reads of a row.
    batch_size, val_batch_size: rows per device and forward pass; val_batch_size=None is batch_size.
    workers: processes that prepare batches; 0 prepares them in the training process.
    shuffle: draw a new order of rows every epoch.
    seed: of that order.

    A subclass sets `kind`, the option of the group `data` by which objectives ask for it, and `min_batch_rows`, where its
    loss needs several rows in a batch.
    """

    kind = "text"  # the option of the group `data`
    streaming = False
    source_names: tuple[str, ...] = ()  # of a mixture; batches then have the `sources` of their rows
    min_batch_rows = 1
    train_rows: Dataset
    val_rows: Dataset
    collate: Collate

    def __init__(
        self, *, seq_len: int, batch_size: int, val_batch_size: int | None, workers: int, shuffle: bool, seed: int
    ) -> None:
        super().__init__()
        self.seq_len, self.batch_size, self.val_batch_size = seq_len, batch_size, val_batch_size or batch_size
        self.workers, self.shuffle, self.seed = workers, shuffle, seed
        self.n_batches = 0  # training batches of the whole run, which a stream has to give
        self.expected_batches = 0  # those that it takes, by which the weights of a mixture change

    def fit_to_model(self, *, seq_len: int, batch_size: int, val_batch_size: int) -> None:
        """Take the sizes of batches that fit the model's context; before `prepare`."""
        self.seq_len, self.batch_size, self.val_batch_size = seq_len, batch_size, val_batch_size

    def limit_batches(self, n_batches: int, *, expected: int) -> None:
        """Take the number of training batches of the run, after which a stream ends, and of those that are expected.

        A rollout is one batch and several steps, of which there may be fewer than expected.
        """
        self.n_batches, self.expected_batches = n_batches, expected

    def train_tokenizer(self, vocab_size: int) -> "PreTrainedTokenizerBase":
        """A byte-pair tokenizer of `vocab_size` tokens learned from the training texts."""
        return train_bpe(self.training_texts(), vocab_size)

    def training_texts(self) -> Iterable[str]:
        """The texts that a tokenizer is learned from."""
        raise NotImplementedError

    def prepare(self, tokenizer: "PreTrainedTokenizerBase", collate: Collate) -> None:
        """Tokenize with the tokenizer and set `train_rows`, `val_rows` and `collate`, the objective's collator."""
        raise NotImplementedError

    def has_conversations(self) -> bool:
        """Whether examples are messages, so that the tokenizer needs a chat template."""
        return False

    def summary(self) -> str:
        """One line about the data: where from, how many rows or tokens, how many for validation."""
        raise NotImplementedError

    def mixture_metrics(self) -> dict[str, float]:
        """Tokens seen and shares by source so far, under the names of their metrics; none without a mixture."""
        return {}

    def mixture_lines(self) -> list[str]:
        """Lines on what each source of a mixture has given; none without one."""
        return []

    def prompt(self) -> str:
        """A prompt out of the validation data, for samples that are logged during training."""
        raise NotImplementedError

    def batch_plan(self) -> BatchPlan:
        """The rows of a step that this process takes, by the trainer's ranks and accumulation."""
        trainer = self.trainer
        ranks = trainer.strategy.distributed_sampler_kwargs if trainer and trainer.world_size > 1 else {}
        return BatchPlan(
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            rank=ranks.get("rank", 0),
            world_size=ranks.get("num_replicas", 1),
            workers=self.workers,
            seed=self.seed,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> EpochLoader:
        return EpochLoader(self.train_rows, self.collate, self.batch_plan(), shuffle=self.shuffle)

    def val_dataloader(self) -> DataLoader:
        # a generator of its own: validation must not advance the global one, or it would change the training
        return DataLoader(
            KeyedExamples(self.val_rows),
            batch_sampler=validation_batches(
                len(self.val_rows), self.val_batch_size, self.batch_plan(), min_rows=self.min_batch_rows
            ),
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(0),
        )

    def steps_per_epoch(self, accumulate: int, world_size: int) -> int:
        """Optimizer steps of one pass over the training rows."""
        rows: Sized = self.train_rows
        return -(-max(1, len(rows) // (self.batch_size * world_size)) // accumulate)
