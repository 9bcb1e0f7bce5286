"""Intervals of optimizer steps: whether something that happens every n steps is due, and callbacks that do it."""

import time
from abc import abstractmethod
from collections.abc import Callable

import lightning as L


def passed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` was reached after step `before`, up to step `now`; a batch may be several steps.

    >>> passed(4, 5, 5), passed(5, 6, 5), passed(3, 11, 5)
    (True, False, True)
    """
    return now // every > before // every


class PeriodicCallback(L.Callback):
    """Base of callbacks that act every n optimizer steps and at the last one, on all ranks, and know what that takes.

    every_n_steps: optimizer steps between two times. spent: told the seconds of each.

    seconds: that acting has taken in this process
    """

    def __init__(self, every_n_steps: int, spent: Callable[[float], None] | None) -> None:
        self.every_n_steps, self.spent = every_n_steps, spent
        self.seconds = 0.0
        self._last = 0

    @abstractmethod
    def act(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        """What is due after this step; every rank calls it."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        step, before = trainer.global_step, self._last
        due = passed(before, step, self.every_n_steps) or step == trainer.max_steps
        self._last = step
        if not due or step == before:
            return
        start = time.perf_counter()
        self.act(trainer, module, step)
        seconds = time.perf_counter() - start
        self.seconds += seconds
        if self.spent is not None:
            self.spent(seconds)
