"""Rules about options without effect: a reason, the options that it covers, and conditions on a configuration."""

from collections.abc import Callable
from typing import NamedTuple

from omegaconf import DictConfig

Condition = Callable[[DictConfig], bool]


class Rule(NamedTuple):
    """One reason why options have no effect.

    options: names of options; one that ends in a dot stands for all options below it.
    holds: a function of the configuration, True where the reason applies.
    reason: the end of the sentence "OPTION=VALUE: has no effect: ...".
    """

    options: tuple[str, ...]
    holds: Condition
    reason: str


def is_one_of(option: str, *values: object) -> Condition:
    """Condition that an option has one of the values; an option or group that does not exist counts as None."""

    def holds(config: DictConfig) -> bool:
        """The option's value, by its path, is among the values."""
        value: object = config
        for part in option.split("."):
            value = value.get(part) if isinstance(value, DictConfig) else None
        return value in values

    return holds


def fails(holds: Condition) -> Condition:
    """Condition that another does not hold."""
    return lambda config: not holds(config)


def all_hold(*conditions: Condition) -> Condition:
    """Condition that all of these hold."""
    return lambda config: all(holds(config) for holds in conditions)


def objective_is(*names: str) -> Condition:
    """Condition that the objective's module is one of these classes."""
    return lambda config: config.objective._target_.rpartition(".")[2] in names
