"""Whether the values of a dataclass are of the types that its fields say."""

import math
from dataclasses import fields
from typing import get_args

from genai_pl.errors import ConfigError

MAX_SIZE = 2**31 - 1
NUMBERS = {int: "a whole number of at most 2^31 - 1", float: "a number", bool: "true or false"}


def check_numbers(config: object, prefix: str) -> None:
    """ConfigError for a field of numbers or truth values with a value of another type: a string, NaN, or true for 1."""
    for option in fields(config):
        value, kinds = getattr(config, option.name), get_args(option.type) or (option.type,)
        what = next((words for kind, words in NUMBERS.items() if kind in kinds), None)
        if what is not None and not _is_of(value, kinds):
            raise ConfigError(f"{prefix}.{option.name} must be {what}, not {value!r}")


def _is_of(value: object, kinds: tuple[type, ...]) -> bool:
    if type(value) is float or (type(value) is int and float in kinds):
        return float in kinds and math.isfinite(value)
    return type(value) in kinds and (type(value) is not int or abs(value) <= MAX_SIZE)
