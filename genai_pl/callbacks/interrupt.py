"""SIGTERM and SIGINT end a run at the next step, with a checkpoint; a second Ctrl-C ends it at once."""

import logging
import signal
from types import FrameType

import lightning as L

log = logging.getLogger(__name__)


class Interrupt(L.Callback):
    """Remembers the signal in `signum`; training stops as soon as the step under way is complete."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._old: dict[int, object] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Lightning's own SIGTERM handler talks to other ranks from inside the handler: replaced
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._old[signum] = signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        log.warning("%s: stopping after this step", signal.Signals(signum).name)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        if module.window:
            return  # inside an accumulation window
        stop = self.signum is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            self.signum = self.signum or signal.SIGTERM  # that another process was sent
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate before it stops, and the grace period is short

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
