"""Field values of configuration dataclasses: checks against their annotations, and conversion to JSON.

Dataclasses do not check types, and YAML, JSON and notebooks supply strings, floats and NaN where an int is meant.
"""

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import get_args, get_origin

from genai_pl.errors import ConfigError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000  # more are a mistake, and would be built one by one before it shows
NUMBERS = {int: "a whole number of at most 2^31 - 1", float: "a number", bool: "true or false"}


def parse_enums(config: object, prefix: str) -> None:
    """Replace strings by the members of the enums that the fields are annotated with; ConfigError names the
    allowed words.

    config: a dataclass instance, changed in place. prefix: the option group, for the message.
    """
    for option in fields(config):
        if isinstance(option.type, type) and issubclass(option.type, Enum):
            value, names = getattr(config, option.name), [member.value for member in option.type]
            if value not in names:
                raise ConfigError(f"{prefix}.{option.name}={value} is not one of {', '.join(names)}")
            setattr(config, option.name, option.type(value))


def check_positive(config: object, prefix: str, names: Iterable[str]) -> None:
    """ConfigError for a field of these names that is set and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ConfigError(f"{prefix}.{name} must be a number above 0, not {value!r}")


def check_numbers(config: object, prefix: str) -> None:
    """ConfigError for an int, float or bool field with a value of another type: a string, NaN, true for 1, or
    above 2^31 - 1.
    """
    for option in fields(config):
        if get_origin(option.type) in (list, tuple, dict):
            continue
        value, kinds = getattr(config, option.name), get_args(option.type) or (option.type,)
        description = next((words for kind, words in NUMBERS.items() if kind in kinds), None)
        if description is not None and not _has_type(value, kinds):
            raise ConfigError(f"{prefix}.{option.name} must be {description}, not {value!r}")


def _has_type(value: object, kinds: tuple[type, ...]) -> bool:
    """True if the value has one of the types: an int may stand for a float, a bool for nothing else; floats must
    be finite.
    """
    if type(value) is float or (type(value) is int and float in kinds):
        return float in kinds and math.isfinite(value)
    return type(value) in kinds and (type(value) is not int or abs(value) <= MAX_SIZE)


def to_json_values(config: object) -> dict[str, object]:
    """The fields as a dict of JSON values: enums by their word, tuples as lists, nested dataclasses as dicts."""
    values = {key: value.value if isinstance(value, Enum) else value for key, value in vars(config).items()}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return {key: to_json_values(value) if is_dataclass(value) else value for key, value in values.items()}
