"""Instantiation of configuration nodes: `_target_` names a class or function, and this module decides whether it may
be called.

A run folder, and so a configuration, can come from somebody else. Hydra alone would call whatever `_target_` names,
`os.system` included. Here a target must be of this project, of Lightning, torch or torchmetrics, or of a package
that the user named in this very command: in an override, in a file below `--config-dir`, or in `GENAI_PL_IMPORT`.
Arguments are checked against the target's signature and type hints before it is called, so that a typo is one line
and not a traceback from its inside.
"""

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
    """The object of a node's `_target_`, with nested nodes instantiated first; every target and argument is
    checked before any call.

    node: a node of the configuration, or plain data of one. at: the option path of plain data, for messages (a
    DictConfig knows its own). kwargs: further arguments of the outermost target, as of hydra.utils.instantiate.
    Raises ConfigError for a target that is not allowed, an unknown argument or a value outside of its hint; a
    UserError of the target itself keeps its line.
    """
    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    for name in _target_names(values):
        locate_target(name)
    check_arguments(values, at or (str(node._get_full_key(None)) if OmegaConf.is_config(node) else ""))
    try:
        # Hydra wraps what a constructor raises: a user's mistake is unwrapped again
        made = hydra_instantiate(node, **kwargs)
        _check_partial(made)
        return made
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _check_partial(made: object) -> None:
    """ConfigError for a keyword of a partial that its function does not take: without this check the first call
    would raise it, after the data were read.
    """
    if not isinstance(made, partial):
        return
    parameters = inspect.signature(made.func).parameters
    unknown = (
        [] if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else made.keywords.keys() - parameters.keys()
    )
    for option in sorted(unknown):
        raise ConfigError(f"{option}: {made.func.__module__}.{made.func.__qualname__} has no such option; leave it out")


def locate_target(name: str) -> Any:
    """The class or function of a dotted name; ConfigError unless its package is known or was named by the user in
    this command.

    A full name that the user typed is taken as it is. Any other name must begin with an allowed package, must
    not be a loader that runs code from a file (torch.hub, torch.jit, ...), and what it resolves to must be
    defined in an allowed package too: `genai_pl.atomic_io.os.system` begins with ours and is not.
    """
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
    """ConfigError for an argument in a node, however deep, that its target has not, or whose value its type hint
    does not allow.

    path: the option path of the node. Options with an entry in BOUNDS are skipped: the configuration bounds
    them itself, and may take null for a default of its own.
    """
    if not isinstance(node, dict):
        return
    target = None if node.get("_target_") is None else locate_target(node["_target_"])
    hints = {} if target is None else _hints(target)
    parameters = None if target is None else _parameters(target)
    for name, value in node.items():
        if parameters is not None and name not in parameters and not name.startswith("_"):
            raise ConfigError(f"{path}.{name}: no such option{did_you_mean(name, parameters)}")
        bounded = f"{path}.{name}" in BOUNDS  # null may stand for a default there
        if name in hints and not bounded and not (bound := bound_of(hints[name])).accepts(value):
            raise ConfigError(f"{path}.{name}={as_typed(value)}: expected {bound.expected}")
        check_arguments(value, f"{path}.{name}")


def _parameters(function: object) -> list[str] | None:
    """Names of a function's arguments; None where it takes any name, or where its signature cannot be read.

    An objective passes unknown keywords on to its base classes and to its collator, so the constructors of its
    whole MRO and `make_collator` count.
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
    """Type hints of a function's arguments by name; of a class, those of all its bases' constructors and of its
    collator.
    """
    constructors = (
        [vars(base).get("__init__") for base in reversed(function.__mro__)] if isinstance(function, type) else []
    )
    collator = getattr(function, "make_collator", None)
    hints = {} if collator is None else _hints(collator)
    for constructor in constructors or [function]:
        hints |= getattr(constructor, "__annotations__", {})
    return hints


def typed_targets() -> Iterator[str]:
    """Targets that the user named in this command: in overrides, in YAML below `--config-dir`, and in
    `GENAI_PL_IMPORT`.
    """
    yield from filter(None, (name.strip() for name in os.environ.get(VARIABLE, "").split(",")))
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    # overrides that came out of a run folder name none: `trust` has refused those
    for override in (*job_overrides("hydra"), *job_overrides()):
        yield from TARGET.findall(override)
    for source in hydra.runtime.config_sources:
        folder = Path(source.path.removeprefix("file://"))
        if source.schema == "file" and folder.resolve() != CONF:
            for path in sorted(folder.rglob("*.yaml")):
                yield from TARGET.findall(path.read_text(encoding="utf-8"))


def _target_names(value: object) -> Iterator[str]:
    """Every `_target_` of a node, in nested mappings and lists too."""
    if isinstance(value, dict):
        if value.get("_target_") is not None:
            yield str(value["_target_"])
        for inner in value.values():
            yield from _target_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _target_names(inner)


def _import_dotted(name: str) -> Any:
    """The object of a dotted name. An attribute of a package wins over its submodule of the same name, as for
    Hydra.
    """
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
