"""Objects that a configuration names: of packages that are known, or of those that the user has named now."""

import importlib
import inspect
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf

from genai_pl.config.bounds import BOUNDS, bound_of
from genai_pl.errors import ConfigError, UserError
from genai_pl.plugins import VARIABLE
from genai_pl.training.config_errors import as_typed, did_you_mean
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.trust import CONF

KNOWN = ("genai_pl", "lightning", "torch", "torchmetrics")
LOADERS = re.compile(r"torch\.(hub|jit|load|ops|classes|package|serialization|utils\.(cpp_extension|model_zoo))\b")
TARGET = re.compile(r"""_target_['"]?\s*[=:]\s*['"]?([\w.]+)""")


def instantiate(node: DictConfig | dict[str, Any], *, at: str | None = None, **kwargs: object) -> Any:
    """The object that a node's `_target_` names; ConfigError if it may not be made, a mistake of the user keeps its line.

    `at` is where a node that is plain data stands in the configuration.
    """
    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    for name in _target_names(values):
        locate_target(name)
    check_arguments(values, at or (str(node._get_full_key(None)) if OmegaConf.is_config(node) else ""))
    try:
        made = hydra_instantiate(node, **kwargs)
        _check_partial(made)
        return made
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _check_partial(made: object) -> None:
    """ConfigError for an option that the function does not take which a partial one will call."""
    if not isinstance(made, partial):
        return
    parameters = inspect.signature(made.func).parameters
    unknown = (
        [] if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else made.keywords.keys() - parameters.keys()
    )
    for option in sorted(unknown):
        raise ConfigError(f"{option}: {made.func.__module__}.{made.func.__qualname__} has no such option; leave it out")


def locate_target(name: str) -> Any:
    """The class or function of this name; ConfigError if it is not of a known package, nor of one that the user has named."""
    typed = set(typed_targets())
    roots = {*KNOWN, *(target.partition(".")[0] for target in typed)}
    error = ConfigError(
        f"_target_={name}: not of {', '.join(KNOWN)}; give it on the command line, "
        "or in a file of a folder that --config-dir names"
    )
    if name in typed and name.partition(".")[0] in KNOWN:
        return _import_dotted(name)
    if name.partition(".")[0] not in roots or LOADERS.match(name):
        raise error
    located = _import_dotted(name)
    # genai_pl.atomic_io.os.system begins with genai_pl too
    if str(getattr(located, "__module__", "")).partition(".")[0] not in roots:
        raise error
    return located


def check_arguments(node: object, path: str) -> None:
    """ConfigError for a value that the hints of what `_target_` names do not let pass; `path` is where the node stands."""
    if not isinstance(node, dict):
        return
    target = None if node.get("_target_") is None else locate_target(node["_target_"])
    hints = {} if target is None else _hints(target)
    parameters = None if target is None else _parameters(target)
    for name, value in node.items():
        if parameters is not None and name not in parameters and not name.startswith("_"):
            raise ConfigError(f"{path}.{name}: no such option{did_you_mean(name, parameters)}")
        bounded = f"{path}.{name}" in BOUNDS  # by the configuration, which may take null for a default of its own
        if name in hints and not bounded and not (bound := bound_of(hints[name])).accepts(value):
            raise ConfigError(f"{path}.{name}={as_typed(value)}: expected {bound.expected}")
        check_arguments(value, f"{path}.{name}")


def _parameters(function: object) -> list[str] | None:
    """The names of the arguments of a function; None where it takes any, or does not say.

    An objective hands on to its bases and its collator what it does not know itself.
    """
    collator = getattr(function, "make_collator", None)
    constructors = [vars(base).get("__init__") for base in function.__mro__] if collator else []
    names: list[str] = []
    for constructor in filter(None, constructors or [function]):
        try:
            parameters = inspect.signature(constructor).parameters.values()
        except (TypeError, ValueError):
            return None
        names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names + ((_parameters(collator) or []) if collator else [])
    return None


def _hints(function: object) -> dict[str, object]:
    """The hints of the arguments of a function; those of a class stand in its bases and in its collator too."""
    constructors = (
        [vars(base).get("__init__") for base in reversed(function.__mro__)] if isinstance(function, type) else []
    )
    collator = getattr(function, "make_collator", None)
    hints = {} if collator is None else _hints(collator)
    for constructor in constructors or [function]:
        hints |= getattr(constructor, "__annotations__", {})
    return hints


def typed_targets() -> Iterator[str]:
    """What the command line names: in overrides, in files of its own option folders, and in the variable of plugins."""
    yield from filter(None, (name.strip() for name in os.environ.get(VARIABLE, "").split(",")))
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    for override in (*job_overrides("hydra"), *job_overrides()):  # those of a run folder name none
        yield from TARGET.findall(override)
    for source in hydra.runtime.config_sources:
        folder = Path(source.path.removeprefix("file://"))
        if source.schema == "file" and folder.resolve() != CONF:
            for path in sorted(folder.rglob("*.yaml")):
                yield from TARGET.findall(path.read_text(encoding="utf-8"))


def _target_names(value: object) -> Iterator[str]:
    """Every `_target_` in a node, however deep."""
    if isinstance(value, dict):
        if value.get("_target_") is not None:
            yield str(value["_target_"])
        for inner in value.values():
            yield from _target_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _target_names(inner)


def _import_dotted(name: str) -> Any:
    """What the dotted name stands for; a name of a package stands before its module of that name, as for Hydra."""
    try:
        root, *parts = name.split(".")
        located: Any = importlib.import_module(root)
        for n, part in enumerate(parts, 1):
            if not hasattr(located, part):
                importlib.import_module(".".join([root, *parts[:n]]))
            located = getattr(located, part)
        return located
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_={name}: cannot be imported ({error})") from None
