"""Adafactor: second moments as a row and a column per matrix, for large models in little memory."""

import torch

from genai_pl.distributed.dtensor import is_dtensor
from genai_pl.errors import ConfigError
from genai_pl.optim.checks import check
from genai_pl.optim.groups import NamedParameters, decay_groups, trainable


def adafactor(
    named_parameters: NamedParameters, *, lr: float, beta2_decay: float, clip_threshold: float, weight_decay: float
) -> torch.optim.Adafactor:
    """Adafactor (Shazeer and Stern 2018, algorithm 4) on the parameters that require gradients.

    lr: upper bound of the relative step: a step is min(lr, 1 / sqrt(t)) of the weight's own RMS
    beta2_decay: exponent c of the decay 1 - t^c of second moments, 0 or less
    clip_threshold: largest RMS of an update before scaling

    ConfigError for sharded parameters, whose rows and columns torch's implementation cannot reduce.
    """
    check("optimizer", lr=lr, beta2_decay=beta2_decay, clip_threshold=clip_threshold, weight_decay=weight_decay)
    named = trainable(named_parameters)
    if any(is_dtensor(parameter) for _, parameter in named):
        raise ConfigError("optimizer=adafactor cannot step sharded parameters in torch; take optimizer=adamw or muon")
    return torch.optim.Adafactor(decay_groups(named, weight_decay), lr=lr, beta2_decay=beta2_decay, d=clip_threshold)
