"""Activation recomputation: blocks that keep their input only, and run again in the backward pass."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import genai_pl.kernels.flash.operator
import genai_pl.kernels.grouped_linear  # noqa: F401  these define their operators
from genai_pl.errors import ConfigError
from genai_pl.models import LanguageModel

KINDS = ("full", "selective")


def recompute(model: LanguageModel, every: int, *, kind: str = "full") -> None:
    """Recompute every n-th block in the backward pass instead of keeping its activations (Chen et al. 2016), in place.

    every: 1 is every block
    kind: full, or selective, which keeps the results of matrix products and attention, so that only cheap operations
        run again (Korthikanti et al. 2022, section 5)

    Losses and gradients do not change: dropout draws the same numbers the second time.
    """
    if every < 1:
        raise ConfigError(f"trainer.recompute_every={every}: 1 is every block, n every n-th, null none")
    if kind not in KINDS:
        raise ConfigError(f"trainer.recompute={kind}: full, selective, or null for none")
    options = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept_operations())
    for block in list(dict.fromkeys(model.blocks))[every - 1 :: every]:
        block.forward = partial(checkpoint, block.forward, **options)


def kept_operations() -> list[torch._ops.OpOverload]:
    """The operators whose results selective recomputation keeps: matrix products, and attention of every backend."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_mm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.genai_pl.flash_forward.default,
        torch.ops.genai_pl.grouped_linear.default,
    ]
