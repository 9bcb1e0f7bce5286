"""Environments by name: `objective.environment` as a function that makes one for each episode."""

import inspect
from collections.abc import Callable, Mapping

from genai_pl.environments import SHIPPED
from genai_pl.environments.user_code import OneLineErrors, one_line
from genai_pl.errors import ConfigError, UserError
from genai_pl.training.named_objects import named_object

HOW = f"name a class as module:Class or file.py:Class, or {' or '.join(SHIPPED)}"


def load_environment(name: str, arguments: Mapping[str, object]) -> Callable[[], object]:
    """A function that makes an environment; ConfigError for what is no such class, or takes other arguments.

    name: of a class, or the short name of one that is shipped. arguments: of the class, `objective.environment_args`.
    """
    option = f"objective.environment={name}"
    module, _, attribute = SHIPPED.get(name, name).rpartition(":")
    if not module:
        raise ConfigError(f"{option}: no environment of that name; {HOW}")
    make = named_object(option, module, attribute)
    if not callable(make):
        raise ConfigError(f"{option}: not a class; {HOW}")
    # one is made here: mistakes show before the run begins
    try:
        environment = make(**arguments)
    except UserError:  # an error of ours says it all
        raise
    except Exception as error:  # of a user's constructor
        _check_binds(make, arguments, name)
        reason = f"raised {type(error).__name__}, {one_line(error) or 'without a message'}"
        raise ConfigError(f"objective.environment_args: {name}({_given(arguments)}) {reason}") from None
    missing = [method for method in ("reset", "step") if not callable(getattr(environment, method, None))]
    if missing:
        raise ConfigError(f"{option}: has no {' and no '.join(missing)}; docs/alignment.md#environments shows one")

    def one() -> object:
        with OneLineErrors(option):
            return make(**arguments)

    return one


def _check_binds(make: Callable[..., object], arguments: Mapping[str, object], name: str) -> None:
    """ConfigError for arguments that a class does not take."""
    try:
        inspect.signature(make).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"objective.environment_args: {name} takes {_arguments(make)} ({one_line(error)})") from None


def _given(arguments: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _arguments(make: Callable[..., object]) -> str:
    """The names of the arguments of a class, for an error."""
    try:
        names = ", ".join(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        return "other arguments"
    return names or "no arguments"
