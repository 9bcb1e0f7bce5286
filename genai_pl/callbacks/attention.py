"""Attention of a run on GPUs: a probe chooses the backend before the first step, once for all ranks and for the whole run."""

from collections.abc import Callable, Sequence

import lightning as L
import torch

from genai_pl.kernels import BACKENDS
from genai_pl.kernels.attention_probe import ProbeShape
from genai_pl.kernels.preference import prefer
from genai_pl.models.attention_choice import prefer_fastest


class AttentionProbe(L.Callback):
    """Lets rank 0 probe, tells the others, and keeps the order of backends for checkpoints, so that a resume has the same.

    shape: of the model's attention, known when the run starts; None where there is nothing to choose
    stored: the order in the checkpoint of a resumed run, None for a new run
    keep: called with the order, to store it
    say: prints a line
    """

    def __init__(
        self,
        shape: Callable[[], ProbeShape | None],
        *,
        stored: object,
        keep: Callable[[tuple[str, ...]], None],
        say: Callable[[str], None],
    ) -> None:
        self.shape, self.keep, self.say = shape, keep, say
        self.stored = _as_order(stored)

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Probe on rank 0 and follow its choice on all; a collective."""
        if stage != "fit":
            return
        device: torch.device = trainer.strategy.root_device
        choice = prefer_fastest(self.shape(), device, keep=self.stored) if trainer.is_global_zero else None
        choice = trainer.strategy.broadcast(choice)
        if choice is None:
            return
        prefer(choice.preference())
        self.keep(choice.backends)
        if trainer.is_global_zero:
            for line in choice.lines():
                self.say(f"attention   {line}")


def _as_order(stored: object) -> tuple[str, ...] | None:
    """The names of backends that a checkpoint holds; None for anything else, as a checkpoint is data of others."""
    if not isinstance(stored, Sequence) or not all(name in BACKENDS[1:] for name in stored):
        return None
    return tuple(stored)
