"""Bounds of the options of optimizers and schedules, and the errors that name them."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from genai_pl.errors import ConfigError

T = TypeVar("T")
Rule = tuple[Callable[..., bool], str]

POSITIVE: Rule = (lambda value: 0.0 < value < math.inf, "above 0")
NOT_NEGATIVE: Rule = (lambda value: 0.0 <= value < math.inf, "0 or more")
FRACTION: Rule = (lambda value: 0.0 <= value <= 1.0, "between 0 and 1")
BELOW_ONE: Rule = (lambda value: 0.0 <= value < 1.0, "at least 0 and below 1")

RULES: dict[str, Rule] = {
    "lr": POSITIVE,
    "adam_lr": POSITIVE,
    "betas": (lambda pair: len(pair) == 2 and all(0.0 <= b < 1.0 for b in pair), "two numbers, at least 0 and below 1"),
    "eps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "momentum": BELOW_ONE,
    "beta2_decay": (lambda value: -math.inf < value <= 0.0, "0 or less"),
    "clip_threshold": (lambda value: 1.0 <= value < math.inf, "at least 1"),
    "warmup_steps": NOT_NEGATIVE,
    "min_lr_ratio": FRACTION,
    "decay_fraction": FRACTION,
    "step_size": (lambda value: value >= 1, "at least 1"),
    "gamma": POSITIVE,
}


def check(group: str, **options: object) -> None:
    """Raise ConfigError for the first option that breaks its rule; `group` is where the user set it."""
    for name, value in options.items():
        holds, rule = RULES[name]
        if not holds(value):
            raise ConfigError(f"{group}.{name} must be {rule}, not {value}")


def choose(option: str, name: str, choices: Mapping[str, T]) -> T:
    """The value of that name, or a ConfigError that lists the names; `option` is where the user set it."""
    if name not in choices:
        raise ConfigError(f"{option} must be one of {', '.join(choices)}, not {name}")
    return choices[name]
