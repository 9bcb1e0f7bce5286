"""Activations that are computed twice instead of kept."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from genai_pl.errors import ConfigError


def recompute(model: nn.Module, every: int) -> None:
    """Make every n-th block keep only its input, and run again in the backward pass (Chen et al. 2016), in place.

    Losses and gradients stay as they are: dropout draws the same numbers the second time.
    """
    if every < 1:
        raise ConfigError(f"trainer.recompute_every={every}: 1 is every block, n every n-th, null none")
    for block in list(dict.fromkeys(model.blocks))[every - 1 :: every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
