"""Interruption by signals: a run ends between two steps, all processes at the same place.

A signal reaches one process at any time; stopping at once would leave the others waiting in a collective. So every
process asks at the same places, after an optimizer step and after a batch of a validation, and the highest signal
number among them decides.
"""

from collections.abc import Callable

import lightning as L
import torch

from genai_pl import signals


class Interrupt(L.Callback):
    """Stops the run, all processes at one place, after one of them has received a signal.

    signum: the signal that all processes have agreed on, None before
    left_out: whether training, or the validation of the last step, was cut short for it
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.left_out = False
        self.describe: Callable[[], str] = str  # from `describe_with`

    def describe_with(self, describe: Callable[[], str]) -> None:
        """Set the function that returns the last line: what is saved and how the run goes on."""
        self.describe = describe

    def begin(self) -> None:
        """From now on there is something to save: signals wait for the next place to stop at."""
        signals.save_first(self.describe)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begin()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        """Stop after a complete optimizer step, without the validation that would be due: the grace period is short."""
        if module.window or not self.agree(trainer):  # no stop inside an accumulation window
            return
        unvalidated = trainer.enable_validation and module.validated_at != trainer.global_step
        self.left_out = unvalidated or trainer.global_step < module.total_steps
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # else Lightning validates before it stops

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        """Stop within a validation, whose partial result is dropped."""
        if not self.agree(trainer):
            return
        self.left_out = module.validation_cut = trainer.should_stop = True
        raise StopIteration  # ends Lightning's loop over the batches

    def agree(self, trainer: L.Trainer) -> bool:
        """Whether any process has received a signal; a collective, so all must ask at the same places."""
        signum = self.signum or signals.received_signal() or 0
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            signum = int(trainer.strategy.reduce(torch.tensor(float(signum), device=device), reduce_op="max"))
        self.signum = signum or None
        return self.signum is not None
