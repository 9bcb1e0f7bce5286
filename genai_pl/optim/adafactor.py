"""Adafactor: second moments as a row and a column per matrix, for large models in little memory."""

import torch

from genai_pl.errors import ConfigError
from genai_pl.optim.checks import check
from genai_pl.optim.groups import NamedParameters, decay_groups, trainable


def adafactor(
    named_parameters: NamedParameters, *, lr: float, beta2_decay: float, clip_threshold: float, weight_decay: float
) -> torch.optim.Adafactor:
    """Adafactor (Shazeer and Stern 2018, algorithm 4): a step is min(lr, 1 / sqrt(t)) of the weight's own RMS."""
    check("optimizer", lr=lr, beta2_decay=beta2_decay, clip_threshold=clip_threshold, weight_decay=weight_decay)
    from torch.distributed.tensor import DTensor  # late: half a second that a CPU run need not spend

    named = trainable(named_parameters)
    if any(isinstance(parameter, DTensor) for _, parameter in named):
        raise ConfigError("optimizer=adafactor cannot step sharded parameters in torch; take optimizer=adamw or muon")
    return torch.optim.Adafactor(decay_groups(named, weight_decay), lr=lr, beta2_decay=beta2_decay, d=clip_threshold)
