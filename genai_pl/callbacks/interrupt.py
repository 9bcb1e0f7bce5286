"""Signals end a run between two steps, or between two batches of a validation, on all processes together."""

from collections.abc import Callable

import lightning as L
import torch

from genai_pl import signals


class Interrupt(L.Callback):
    """Stops the run, its processes all at one place, when one of them was sent a signal.

    `describe` says what is saved. `signum` is the signal that all have agreed on, None before; `left_out` whether training
    or the validation of the last step was cut short for it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.left_out = False
        self.describe: Callable[[], str] = str  # from `describe_with`

    def describe_with(self, describe: Callable[[], str]) -> None:
        """Take the function that says what is saved and how the run goes on."""
        self.describe = describe

    def begin(self) -> None:
        """From here on there is something to save: signals wait for the next place to stop at."""
        signals.save_first(self.describe)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begin()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if module.window or not self.agree(trainer):  # no stop inside an accumulation window
            return
        unvalidated = trainer.enable_validation and module.validated_at != trainer.global_step
        self.left_out = unvalidated or trainer.global_step < module.total_steps
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # Lightning would validate before it stops, and the grace period is short

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if not self.agree(trainer):
            return
        self.left_out = module.validation_cut = trainer.should_stop = True
        raise StopIteration  # ends Lightning's loop over the batches

    def agree(self, trainer: L.Trainer) -> bool:
        """Whether any process was sent a signal: all of them must ask at the same place."""
        signum = self.signum or signals.received_signal() or 0
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            signum = int(trainer.strategy.reduce(torch.tensor(float(signum), device=device), reduce_op="max"))
        self.signum = signum or None
        return self.signum is not None
