"""Products of linear layers in float8, by torchao."""

from importlib.util import find_spec

import torch
from torch import nn

from genai_pl.errors import ConfigError

CAPABILITY = (8, 9)  # the first GPUs with products in float8
MULTIPLE = 16  # of both sizes of a weight, which torch's product in float8 asks for


def float8(model: nn.Module) -> None:
    """Make the linear layers of the blocks multiply in float8, each tensor scaled by its largest value, in place.

    Weights stay as they are (Micikevicius et al. 2022; E4M3 forward, E5M2 for gradients). ConfigError where it cannot run.
    """
    check_float8()
    from torchao.float8 import convert_to_float8_training

    for block in dict.fromkeys(model.blocks):
        convert_to_float8_training(block, module_filter_fn=lambda module, name: fits_float8(module))


def fits_float8(module: nn.Module) -> bool:
    """Whether a layer can multiply in float8."""
    return isinstance(module, nn.Linear) and all(size % MULTIPLE == 0 for size in module.weight.shape)


def check_float8() -> None:
    """ConfigError where the GPU or the package is missing."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        raise ConfigError(
            "precision=fp8 needs a GPU that multiplies in it (L4, RTX 4090, H100 or newer): precision=bf16"
        )
    if find_spec("torchao") is None:
        raise ConfigError("precision=fp8: the package torchao is not installed; pip install torchao, or precision=bf16")
