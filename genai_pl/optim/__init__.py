"""Optimizers over named parameters, and learning-rate schedules as pure functions of the step."""

from genai_pl.optim.adafactor import adafactor
from genai_pl.optim.adamw import adam, adamw
from genai_pl.optim.groups import decay_groups
from genai_pl.optim.in_backward import StepInBackward
from genai_pl.optim.muon import MuonAdamW, muon
from genai_pl.optim.schedules import constant, cosine, inverse_sqrt, linear, step_decay, wsd
from genai_pl.optim.sgd import sgd

__all__ = [
    "MuonAdamW",
    "StepInBackward",
    "adafactor",
    "adam",
    "adamw",
    "constant",
    "cosine",
    "decay_groups",
    "inverse_sqrt",
    "linear",
    "muon",
    "sgd",
    "step_decay",
    "wsd",
]
