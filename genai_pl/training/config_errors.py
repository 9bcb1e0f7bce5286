"""Configuration errors in one line: exceptions of Hydra and OmegaConf, translated, and checks that those two do not
make.

Hydra's own messages are several lines, quote the whole search path, and name keys of the ConfigStore. Here each
becomes the option as typed, what is wrong, and the nearest name that exists. The exceptions carry no structure, so
their texts are matched by regular expressions: tests/cli/test_odd_overrides.py runs hundreds of wrong command lines
against the installed versions and fails when a text changes.

The checks: `check_types` (an override of another type than the YAML value it replaces, which untyped YAML accepts),
`check_bounds` (config/bounds.py) and `check_choices` (choices that crash Hydra's parser).
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai_pl.config.bounds import BOUNDS
from genai_pl.errors import ConfigError, UserError
from genai_pl.training.hydra_job import job_overrides

HYDRA_PLUGINS = {  # of Hydra
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
}
OPTIONAL_GROUPS = {"experiment"}  # that null chooses nothing of
OPEN_PREFIXES = ("trainer.", "callbacks.extra.", "logger.", "hydra.")  # added keys are passed on to libraries
ADVICE = {"trainer.val_check_interval": "; trainer.limit_val_batches=0 validates never"}


def explain_config_error(error: Exception, conf: Path, config_name: str, arguments: list[str]) -> str | None:
    """One line for an exception of Hydra or OmegaConf; None for any other exception, which is a defect and keeps
    its traceback.

    conf, config_name: the options folder and the command's root file. arguments: the command line.
    """
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    # a UserError raised in a resolver is wrapped, possibly twice
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):  # raised by a resolver
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    # words that Hydra's grammar does not accept
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not understood{_how_to_quote(error.override)}"
    if match := re.search(r"Ambiguous value for argument '(.*)'\s+1\.", str(error)):
        return f"{match[1]}: values with a comma between them are a sweep (--multirun){_how_to_quote(match[1])}"
    # group=choice without such a file; for Hydra's plugins, what to install
    if isinstance(error, MissingConfigException) and (match := re.search(r"find '([^']*)'", str(error))):
        if package := HYDRA_PLUGINS.get(match[1]):
            group, _, option = match[1].rpartition("/")
            return f"{group}={option}: not installed; pip install {package}"
        line = _no_such_option(match[1], conf)
        if line:
            return line
    # key=value with an unknown key
    message = f"{error}\n{error.__cause__ or ''}"
    if match := re.search(
        r"(?:Could not override|Could not delete|Could not append to config.*?key) '([^']+)'", message
    ):
        return _no_such_key(match[1], message, conf, config_name, arguments)
    # key=value with a value of the wrong type
    if match := re.search(r"full_key: (\S+)", message):
        reason = next(
            (line for line in message.splitlines() if "Value" in line or "Invalid" in line), message.splitlines()[0]
        )
        if reason.startswith("Error merging override"):  # the cause has the reason
            reason = str(error.__cause__).splitlines()[0].replace("is not Optional", "cannot be null")
        if "is not a ListConfig" in reason:
            value = next((a.partition("=")[2] for a in arguments if a.partition("=")[0] == match[1]), "...")
            reason = f"a list is needed: {match[1]}=[{value}]"
        return f"{match[1]}: {reason.strip()}"
    return " ".join(message.split())


def _how_to_quote(override: str) -> str:
    """Advice on quoting, as the end of a message about a word that was not understood."""
    key, equals, value = override.partition("=")
    return f"; text goes in quotes within quotes: \"{key}='{value}'\"" if equals else "; write key=value"


def _no_such_option(name: str, conf: Path) -> str | None:
    """Line about `group=choice` where the group has no such file; None if there is no such group."""
    group, _, option = name.rpartition("/")
    options = sorted(path.stem for path in (conf / group).glob("*.yaml")) if group else []
    if not options:
        return None
    return f"{group}={option}: no such option{did_you_mean(option, options)}; {group} is one of {', '.join(options)}"


def _no_such_key(key: str, message: str, conf: Path, config_name: str, arguments: list[str]) -> str:
    """Line about a key that the composed configuration has not, with the nearest that it has.

    The configuration is composed once more with the groups chosen on the command line, since they decide which
    keys exist.
    """
    if "Value" in message:  # the key is there, the value is not of its type
        reason = next(line for line in message.splitlines() if "Value" in line)
        return f"{key}: {reason.strip()}"
    groups = [a for a in arguments if _is_group(a, conf)]
    config = _compose(conf, config_name, [*_searchpath(arguments), *groups])
    if config is None:
        return f"{key}: no such option"
    parent, _, leaf = key.rpartition(".")
    siblings = [path.rpartition(".")[2] for path in _option_names(config) if path.rpartition(".")[0] == parent]
    if suggestion := did_you_mean(leaf, siblings) or did_you_mean(key, list(_option_names(config))):
        return f"{key}: no such option{suggestion}"
    return f"{key}: no such option; {parent or 'the top level'} has {', '.join(siblings) or 'no fields'}"


def did_you_mean(name: str, candidates: list[str]) -> str:
    """The nearest of the candidates, to be appended to a message; "" if none is near.

    >>> did_you_mean("n_layers", ["n_layer", "n_head"])
    ', did you mean n_layer?'
    """
    matches = get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f", did you mean {matches[0]}?" if matches else ""


def _searchpath(arguments: list[str]) -> list[str]:
    """The hydra.searchpath override of a command line, or what stands for its `--config-dir`; [] without user
    options.
    """
    override = next((a for a in arguments if a.startswith("hydra.searchpath=")), None)
    folders = [value for name, value in pairwise(arguments) if name in ("--config-dir", "-cd")]
    folders += [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    if override is None and folders:
        override = f"hydra.searchpath=['file://{Path(folders[0]).resolve()}']"
    return [] if override is None else [override]


def _is_group(argument: str, conf: Path) -> bool:
    """True for `group=choice`: the key is a folder of conf/."""
    name, equals, _ = argument.partition("=")
    return bool(equals) and (conf / name.split("@")[0]).is_dir()


def _compose(conf: Path, config_name: str, overrides: list[str]) -> DictConfig | None:
    """The configuration of these overrides without the running job's Hydra, to be read only; None if they do not
    compose. Sweeps are left out.
    """
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    chosen = tuple(o for o in overrides if "," not in o)
    # the jobs of a sweep choose the same groups; a user's own files may change between two jobs
    is_shipped = not any(o.startswith("hydra.searchpath") for o in chosen)
    return (_compose_choice if is_shipped else _compose_choice.__wrapped__)(conf, config_name, chosen)


@lru_cache(maxsize=16)
def _compose_choice(conf: Path, config_name: str, overrides: tuple[str, ...]) -> DictConfig | None:
    """The configuration of `_compose`."""
    from hydra import compose, initialize_config_dir

    try:
        with initialize_config_dir(str(conf), version_base="1.3"):
            return compose(config_name, overrides=list(overrides))
    except HydraException:
        return None


def _option_names(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """All dotted names in a configuration, inner nodes included."""
    for key in config:
        yield f"{prefix}{key}"
        value = config._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from _option_names(value, f"{prefix}{key}.")


def check_types(config: DictConfig, overrides: list[str], conf: Path, config_name: str) -> None:
    """UserError for an override whose value has another type than the default it replaces.

    OmegaConf checks typed nodes itself; options in plain YAML (groups without a schema) accept anything, and a
    list where a number belongs would fail deep in a library.
    """
    values = [
        o for o in OverridesParser.create().parse_overrides(overrides) if not (conf / o.get_key_element()).is_dir()
    ]
    if not values:
        return
    # defaults: the same groups, none of the values
    hydra = HydraConfig.get()
    user_folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    searchpath = _searchpath([*(f"--config-dir={folder}" for folder in user_folders), *job_overrides("hydra")])
    defaults = _compose(conf, config_name, [*searchpath, *(o for o in overrides if _is_group(o, conf))])
    # each value against its default, and each added key against what is read at all
    for override in values:
        key = override.get_key_element()
        if defaults is not None and override.is_add() and not user_folders:
            _check_added(override.key_or_group, defaults)
        before = OmegaConf.select(defaults, key) if defaults is not None and override.is_add() is False else None
        after = OmegaConf.select(config, key)
        if isinstance(before, DictConfig) and before and not isinstance(after, DictConfig):
            raise UserError(f"{key}={as_typed(after)}: has fields of its own to be set: {', '.join(map(str, before))}")
        if before is not None and after is not None and not _is_same_kind(before, after):
            raise UserError(f"{key}={after}: expected {_kind(before)}, like {before}")


def _check_added(key: str, defaults: DictConfig) -> None:
    """UserError for an added option (`+key=`) that nothing reads. Lightning's Trainer, loggers, callbacks and
    nodes with a `_target_` take more keywords; so do mappings whose keys are the user's.
    """
    if OmegaConf.select(defaults, key) is not None or key.startswith(OPEN_PREFIXES):
        return
    name, parent = key.rpartition(".")[2], defaults
    for part in key.split(".")[:-1]:
        parent = OmegaConf.select(parent, part)
        if not isinstance(parent, DictConfig) or not parent or "_target_" in parent:
            return  # `targets` checks its arguments, or the mapping is the user's own
    if name not in parent:
        raise UserError(f"{key}: no such option{did_you_mean(name, [str(known) for known in parent])}")


def check_bounds(config: DictConfig) -> None:
    """ConfigError for the first option outside of its bound in config/bounds.py."""
    for option, bound in BOUNDS.items():
        parent, _, leaf = option.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if not isinstance(node, DictConfig) or leaf not in node or OmegaConf.is_missing(node, leaf):
            continue
        value = plain_value(node[leaf])
        if not bound.accepts(value):
            raise ConfigError(f"{option}={as_typed(value)}: expected {bound.expected}{ADVICE.get(option, '')}")


def check_choices(arguments: list[str], conf: Path) -> None:
    """ConfigError for a choice that is no name (`model=3`, `model=[]`), for which Hydra has no message of its own."""
    for argument in arguments:
        group, _, text = argument.partition("=")
        if group == "hydra":
            raise ConfigError(f"{argument}: has fields of its own to be set: hydra.run.dir, hydra.sweep.dir, ...")
        if not _is_group(argument, conf) or group in OPTIONAL_GROUPS:
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:
            continue  # Hydra reports it
        value = None if override.is_sweep_override() else override.value()
        names = value if isinstance(value, list) and value else [value]
        if not override.is_sweep_override() and not all(isinstance(name, str) and name for name in names):
            options = sorted(path.stem for path in (conf / group.split("@")[0]).glob("*.yaml"))
            raise ConfigError(f"{group}={text}: no such option; {group} is one of {', '.join(options)}")


def plain_value(value: object) -> object:
    """The value with OmegaConf's containers converted to dicts and lists."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def as_typed(value: object) -> object:
    """The value as a user types it: null, true, false."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _is_same_kind(before: object, after: object) -> bool:
    """True if a value may replace another: the same kind, or the default is a text, which any word can be."""
    return _kind(before) == _kind(after) or isinstance(before, str)


def _kind(value: object) -> str:
    """A value's type in the words of a message."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "text" if isinstance(value, str) else type(value).__name__.removesuffix("Config").lower()
