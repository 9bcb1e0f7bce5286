"""Averaged weights: an exponential moving average of the weights, which is validated and exported."""

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from genai_pl.errors import ConfigError


class EMA(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, made to resume exactly.

    Lightning puts the averages in the place of the weights before the last checkpoint of a run is written, and so
    loses the weights that a resumed run would continue from; and it expects frozen weights, which our checkpoints
    leave out, in a checkpoint.

    decay: of the average, in [0, 1): the share of the old value at each update
    update_every_n_steps: optimizer steps between updates
    update_starting_at_step: the first step that is averaged; None: the first
    """

    def __init__(self, *, decay: float, update_every_n_steps: int, update_starting_at_step: int | None) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"callbacks.extra.ema.decay={decay} must be at least 0 and below 1")
        # buffers are copied, not averaged: a mean of integers would be rounded down
        super().__init__(
            use_buffers=False,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
        )

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """ConfigError where no process holds the whole model."""
        if isinstance(trainer.strategy, (ModelParallelStrategy, DeepSpeedStrategy)):
            raise ConfigError("callbacks=ema needs the whole model in each process: strategy=ddp, or leave it out")
        super().setup(trainer, module, stage)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Nothing yet: the last checkpoint is written now, and needs the weights as they are."""

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the averages in the place of the weights, for the export."""
        self._copy_average_to_current(module)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict) -> None:
        """Fill in the frozen weights that our checkpoints leave out, from the model."""
        own = module.state_dict()
        whole = {name: own | checkpoint[name] for name in ("state_dict", "current_model_state") if name in checkpoint}
        super().on_load_checkpoint(trainer, module, checkpoint | whole)
