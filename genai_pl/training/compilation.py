"""Compilation of a run: the option `compile`, and the probe on GPUs with what it needs to know of configuration and data."""

from collections.abc import Mapping

import lightning as L
import torch
from omegaconf import DictConfig

from genai_pl.callbacks import CompileProbe, products_dtype
from genai_pl.config.enums import Shape
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.errors import ConfigError
from genai_pl.models.compile_choice import BlockCall, Length, block_call
from genai_pl.modules import BaseModule
from genai_pl.training.precision import Precision

AUTO = "auto"


def check_compile(config: DictConfig) -> None:
    """ConfigError for another value than auto, true and false."""
    if not isinstance(config.compile, bool) and config.compile != AUTO:
        raise ConfigError(f"compile={config.compile}: auto, true or false")


def compile_probe(
    config: DictConfig,
    strategy: object,
    precision: Precision,
    module: BaseModule,
    data: RowsDataModule,
    callbacks: Mapping[str, L.Callback],
    *,
    stored: object,
) -> CompileProbe | None:
    """The callback that chooses for `compile=auto`; None where there is nothing to choose.

    That is where the option is set, and where blocks are computed otherwise than by a pass over a batch in one process: with
    generated rows, in two stacks, or divided among processes. callbacks: by their names in `Run`; checkpoints keep the
    choice, the console prints it. stored: the choice in the checkpoint of a resumed run.
    """
    is_whole = getattr(strategy, "gathers", True)
    is_pass = module.automatic_optimization and module.model.config.shape is not Shape.encoder_decoder
    if config.compile != AUTO or not (is_whole and is_pass):
        return None

    def call() -> BlockCall:
        found = block_call(module.model, data.batch_size, data.seq_len)
        return found.in_dtype(torch.bfloat16) if precision.lightning == "bf16-true" else found

    def length(trainer: L.Trainer, kinds: int) -> Length:
        passes = trainer.accumulate_grad_batches * len(module.model.blocks)
        validates = bool(trainer.limit_val_batches)  # another graph, without gradients
        varies = data.kind != "text"  # rows of other lengths: a second graph, for all of them
        return Length(module.total_steps, passes, kinds * (1 + validates) * (1 + varies))

    def keep(compiled: bool) -> None:
        callbacks["checkpoints"].contents["compile"] = compiled

    dtype, say = products_dtype(precision.lightning), callbacks["console"].say
    return CompileProbe(call, dtype, length, stored=stored, keep=keep, say=say)
