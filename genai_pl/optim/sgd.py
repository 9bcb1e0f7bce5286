"""Stochastic gradient descent."""

import torch

from genai_pl.errors import ConfigError
from genai_pl.optim.checks import check
from genai_pl.optim.groups import NamedParameters, decay_groups


def sgd(
    named_parameters: NamedParameters, *, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.SGD:
    """SGD with L2 decay: without momentum, theta - lr * (grad + weight_decay * theta)."""
    check("optimizer", lr=lr, momentum=momentum, weight_decay=weight_decay)
    if nesterov and momentum == 0.0:
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")
    return torch.optim.SGD(decay_groups(named_parameters, weight_decay), lr=lr, momentum=momentum, nesterov=nesterov)
