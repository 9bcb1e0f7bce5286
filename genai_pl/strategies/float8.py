"""Float8: matrix products of linear layers in 8 bits, by torchao."""

from importlib.util import find_spec

import torch
from torch import nn

from genai_pl.errors import ConfigError
from genai_pl.models import LanguageModel

CAPABILITY = (8, 9)  # compute capability of the first GPUs with float8 products
MULTIPLE = 16  # both sizes of a weight must be one, for torch's float8 product


def float8(model: LanguageModel) -> None:
    """Make the linear layers of the blocks multiply in float8, each tensor scaled by its largest value, in place.

    Weights keep their dtype and are converted in each forward pass (Micikevicius et al. 2022; E4M3 forward, E5M2 for
    gradients). Layers whose sizes do not fit stay as they are. ConfigError where float8 cannot run.
    """
    check_float8()
    from torchao.float8 import convert_to_float8_training

    for block in dict.fromkeys(model.blocks):
        convert_to_float8_training(block, module_filter_fn=lambda module, name: fits_float8(module))


def fits_float8(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose sizes a float8 product takes."""
    return isinstance(module, nn.Linear) and all(size % MULTIPLE == 0 for size in module.weight.shape)


def check_float8() -> None:
    """ConfigError where the GPU cannot multiply in float8, or torchao is not installed."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY:
        raise ConfigError(
            "precision=fp8 needs a GPU that multiplies in it (L4, RTX 4090, H100 or newer): precision=bf16"
        )
    if find_spec("torchao") is None:
        raise ConfigError("precision=fp8: the package torchao is not installed; pip install torchao, or precision=bf16")
