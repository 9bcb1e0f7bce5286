"""Compilation of a run on GPUs: a probe decides before the first step, once for all ranks and for the whole run."""

from collections.abc import Callable

import lightning as L
import torch

from genai_pl.kernels.attention_probe import first_line, machine_of, table_file
from genai_pl.models.compile_choice import (
    BlockCall,
    CompileChoice,
    Length,
    cached_timing,
    compile_blocks,
    decide,
    gpu_tools,
)
from genai_pl.modules import BaseModule


class CompileProbe(L.Callback):
    """Lets rank 0 time a block, tells the others, and keeps the choice for checkpoints, so that a resume has the same.

    It stands after the probe of attention, whose choice the timed block has.

    call: makes the block and its arguments, when the run starts; dtype: of products
    length: of the run, for a model with a number of different blocks
    stored: the choice in the checkpoint of a resumed run, None for a new run
    keep: called with the choice, to store it
    say: prints a line
    """

    def __init__(
        self,
        call: Callable[[], BlockCall],
        dtype: torch.dtype,
        length: Callable[[L.Trainer, int], Length],
        *,
        stored: object,
        keep: Callable[[bool], None],
        say: Callable[[str], None],
    ) -> None:
        self.call, self.dtype, self.length, self.keep, self.say = call, dtype, length, keep, say
        self.stored = stored if isinstance(stored, bool) else None  # a checkpoint is data of others

    def setup(self, trainer: L.Trainer, module: BaseModule, stage: str) -> None:
        """Choose on rank 0, and compile on all ranks or on none; a collective."""
        device: torch.device = trainer.strategy.root_device
        if stage != "fit" or device.type != "cuda":
            return
        choice = self._choose(trainer, device) if trainer.is_global_zero else None
        choice = trainer.strategy.broadcast(choice)
        self.keep(choice.on)
        if choice.on:
            compile_blocks(module.model)
        if trainer.is_global_zero:
            self.say(f"compile     {choice.line()}")

    def _choose(self, trainer: L.Trainer, device: torch.device) -> CompileChoice:
        """The choice of this rank, which is the first."""
        if self.stored is not None:
            return CompileChoice(self.stored, "as the run began")
        choice = probe(self.call, device, self.dtype, lambda kinds: self.length(trainer, kinds), trainer)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return choice


def probe(
    call: Callable[[], BlockCall],
    device: torch.device,
    dtype: torch.dtype,
    length: Callable[[int], Length],
    trainer: L.Trainer,
) -> CompileChoice:
    """The choice for a run on this GPU, with the products of the trainer's precision."""
    try:
        block = call()
    except Exception as error:  # a model that is called otherwise
        return CompileChoice(False, f"no block can be timed alone ({first_line(error)})")
    given = {"autocast": trainer.precision_plugin.forward_context, "machine": machine_of(device)}
    timing = cached_timing(block, device, dtype, file=table_file("compile"), tools=gpu_tools(), **given)
    return decide(timing, length(block.kinds))
