"""Trust in saved overrides: which options of a run folder count again when the run is resumed.

A run folder may be a stranger's, and `.hydra/overrides.yaml` in it would otherwise be a command line that runs on
this machine. Trusted are plain options: `key=value` of a known group, choices whose file is shipped or lies below
the user's `--config-dir`, and sweeps of those. Not trusted, and to be typed again, is what names code (`_target_`,
module:function, `callbacks.extra` of others), places (network addresses, Hydra's search path and folders), values
from elsewhere (`${...}`) and secrets. A file that is not a short YAML list is refused unread: no message quotes it,
because a terminal obeys escape sequences.

The rules answer "is this safe to repeat", not "is this correct": a trusted option with a wrong value fails later,
as if typed.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException

from genai_pl.config.redaction import contains_secret
from genai_pl.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
TRUSTED_GROUPS = {  # every field of these may be set by a saved command
    *("model", "data", "tokenizer", "objective", "peft", "optimizer", "scheduler"),
    *("precision", "strategy", "trainer", "generation", "plan", "eval"),
}
TRUSTED_CALLBACKS = {
    "checkpoint",
    "early_stopping",
    "notify",  # its address is typed again, as every one of the network
    "samples",
    "export",
}  # `extra` names code, except for shipped callbacks
# options that each command gives anew: they are never taken from a saved run
PER_COMMAND = {"resume", "dry_run", "output_dir", "hydra.run.dir", "hydra.sweep.dir", "hydra.mode"}
MAX_BYTES, MAX_OVERRIDES = 2**18, 500  # of one file
MAX_OVERRIDE_CHARS, MAX_BRACKETS = 2**12, 20  # of one override
CHOICE_NAME = re.compile(r"[\w-]+")
FUNCTION_NAME = re.compile(r"[\w./~-]*\w:[A-Za-z_]\w*")  # module:function, or file.py:function
DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")  # module.function, which a reward may be


class _ReferenceFreeLoader(yaml.SafeLoader):
    """Safe YAML without aliases: a few nested ones expand to gigabytes ("billion laughs")."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references are not read")
        return super().compose_node(parent, index)


def read_untrusted_yaml(path: Path) -> object:
    """Contents of a YAML file of at most MAX_BYTES; UserError with path and error type, and nothing of the
    contents, for any other.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: cannot be read (not a file of at most {MAX_BYTES // 1024} KiB)")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_ReferenceFreeLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None


def read_overrides(path: Path, *keys: str) -> list[str]:
    """A list of overrides in a YAML file, below `keys` of its mapping; [] for an empty file.

    UserError where it is no list of strings, has more than MAX_OVERRIDES entries, or an entry is longer or
    nests deeper than any that this project writes (Hydra's parser is recursive).
    """
    contents = read_untrusted_yaml(path)
    for key in keys:
        contents = contents.get(key) if isinstance(contents, dict) else None
    if contents is None and not keys:
        return []
    if not isinstance(contents, list) or len(contents) > MAX_OVERRIDES or not all(isinstance(o, str) for o in contents):
        raise UserError(f"{path}: cannot be read (not a list of overrides)")
    if any(len(o) > MAX_OVERRIDE_CHARS or sum(map(o.count, "[{(")) > MAX_BRACKETS for o in contents):
        raise UserError(f"{path}: cannot be read (an override is too long)")
    return contents


def key_of(argument: str) -> str:
    """The option of an override, without its prefix.

    >>> key_of("+trainer.max_steps=3"), key_of("~logger"), key_of("--multirun")
    ('trainer.max_steps', 'logger', '--multirun')
    """
    return argument.partition("=")[0].lstrip("+~")


def value_of(argument: str) -> str:
    """The value of an override without its outer quotes."""
    return argument.partition("=")[2].strip("'\"")


def trusted_overrides(overrides: Iterable[str], path: Path, arguments: Sequence[str]) -> list[str]:
    """Saved overrides to be put before a command line: all but those that the command line gives itself.

    path: the file, for messages. arguments: the command line, which also names the user's own option folders.
    UserError where one of them is not trusted, with the reason for each: a resume stops, rather than going on
    without an option.
    """
    typed_keys = {key_of(a) for a in arguments}
    kept = [o for o in overrides if key_of(o) not in typed_keys | PER_COMMAND]
    if refused := untrusted_overrides(kept, arguments):
        reasons = "; ".join(f"{_printable(o)} {reason}" for o, reason in refused.items())
        raise UserError(f"{path}: {reasons}; what of that you trust must be typed again on the command line")
    return kept


def untrusted_overrides(overrides: Iterable[str], arguments: Sequence[str]) -> dict[str, str]:
    """Overrides that count only where the user types them, each with the reason. A command repeats these words in
    its `next` line.
    """
    folders = [CONF, *user_config_folders(arguments)]
    return {o: reason for o in overrides if (reason := _distrust_reason(o, folders))}


def check_links(run: Path) -> None:
    """UserError for a symbolic link in a run folder that leads out of it: checkpoints and logs would be written
    through it.
    """
    paths = [p for folder in (run, run / ".hydra", run / "checkpoints") if folder.is_dir() for p in folder.iterdir()]
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"{path}: a link out of the run folder, which would be written to; put the thing itself there"
            )


def names_user_code(arguments: Sequence[str]) -> bool:
    """True if a command line names code of the user: a `_target_`, a reward as module:function, or a folder of
    options.

    Such a command may import the modules of `GENAI_PL_IMPORT` before Hydra reads any configuration.
    """
    functions = (re.search(FUNCTION_NAME, a.partition("=")[2]) for a in arguments if key_of(a).startswith("objective."))
    return any("_target_" in a for a in arguments) or any(functions) or bool(user_config_folders(arguments))


def user_config_folders(arguments: Sequence[str]) -> list[Path]:
    """Option folders that a command line names, by `--config-dir` and by `hydra.searchpath`, as absolute paths."""
    paths = [value for name, value in pairwise(arguments) if name in ("--config-dir", "-cd")]
    paths += [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    search_paths = [a.partition("=")[2] for a in arguments if key_of(a) == "hydra.searchpath"]
    paths += [path for text in search_paths for path in re.findall(r"file://([^'\",\]]+)", text)]
    return [Path(folder).resolve() for folder in paths]


def _distrust_reason(text: str, folders: Sequence[Path]) -> str | None:
    """Reason why an override is not trusted, as the end of a sentence; None for a plain option. folders: conf/ and
    the user's own.
    """
    if contains_secret(text):
        return "holds a secret"
    try:
        override = OverridesParser.create().parse_override(text)
        values = _values(override)
    except (HydraException, ValueError, RecursionError):
        return "is not understood"
    # refused whatever the value is: code, Hydra's own settings, interpolation
    key, parts = override.key_or_group, re.split(r"[./]", override.key_or_group)
    is_foreign_callback = parts[:2] == ["callbacks", "extra"] and tuple(parts[2:]) not in _shipped_callback_fields()
    if any(part.startswith("_") for part in parts) or is_foreign_callback or "_target_" in text:
        return "names code to run"
    if parts[0] == "hydra" and parts[1:2] != ["launcher"] and parts[1:2] != ["sweeper"]:
        return "changes Hydra: where options are found, the environment, or where files are written"
    if "${" in text:
        return "asks for a value from elsewhere"
    if override.package is not None or override.type is not OverrideType.CHANGE or values is None:
        return "is not a plain option"
    # a choice of a group: its file must be shipped, or the user's own
    if "/" in key or any((folder / key).is_dir() for folder in folders):
        all_shipped = all(_is_choice(key, value, folders) for value in values)
        return None if all_shipped else "is not an option of ours"
    return _field_distrust_reason(parts, values)


@cache
def _shipped_callback_fields() -> frozenset[tuple[str, ...]]:
    """(callback, field) pairs of conf/callbacks: the only options below `callbacks.extra` that a saved command may
    set.
    """
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CONF / "callbacks").glob("*.yaml")]
    entries = [(name, fields) for file in files for name, fields in file.get("extra", {}).items()]
    return frozenset((name, field) for name, fields in entries for field in fields)


@cache
def _shipped_options() -> frozenset[str]:
    """Top-level options that conf/config.yaml has, without its defaults and Hydra's."""
    options = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    return frozenset(options.keys() - {"defaults", "hydra"})


def _values(override: Override) -> list[object] | None:
    """Values that an override sets, one per job of a sweep; None where Hydra alone knows them (glob, interval,
    sort).
    """
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [str(v) if isinstance(v, str) else v for v in value.list]
    if isinstance(value, RangeSweep):
        return [value.start, value.stop, value.step]
    return None if override.is_sweep_override() else [value]


def _is_choice(group: str, value: object, folders: Sequence[Path]) -> bool:
    """True if a group's option file exists in one of the folders, or nothing is chosen. Launchers and sweepers are
    Hydra's plugins.
    """
    if value is None or value == []:
        return True
    if not isinstance(value, str) or not CHOICE_NAME.fullmatch(value):
        return False
    return group in ("hydra/launcher", "hydra/sweeper") or any(
        (folder / group / f"{value}.yaml").is_file() for folder in folders
    )


def _field_distrust_reason(parts: list[str], values: list[object]) -> str | None:
    """Reason why a field's values are not trusted: an unknown root, a launcher's command, a function name, a
    network address.
    """
    leaves = [leaf for value in values for leaf in _leaves(value)]
    if parts[0] == "hydra":  # launchers take shell commands too
        numbers = len(parts) == 3 and all(isinstance(leaf, int | float) for leaf in leaves)
        return None if numbers else "changes Hydra: what a launcher runs"
    # known roots are the groups, and the top-level options that conf/config.yaml has
    is_root = len(parts) == 1 and parts[0] in _shipped_options()
    if not (
        is_root or parts[0] in TRUSTED_GROUPS or (parts[0] == "callbacks" and parts[1] in {*TRUSTED_CALLBACKS, "extra"})
    ):
        return "is not a plain option"
    texts = [leaf for leaf in leaves if isinstance(leaf, str)]
    if parts[0] in ("objective", "eval") and any(FUNCTION_NAME.fullmatch(text) for text in texts):
        return "names code to run"
    if parts[:2] == ["objective", "reward"] and any(
        DOTTED_NAME.fullmatch(text) and not Path(text).exists() for text in texts
    ):
        return "names code to run"
    if parts == ["eval", "execute_code"] and any(value not in (False, "false") for value in values):
        return "lets programs of a model run"
    return "is a network address" if any("://" in text for text in texts) else None


def _leaves(value: object) -> Iterable[object]:
    """All scalars of a nested value, the keys of its mappings included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_leaves(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _printable(override: str) -> str:
    """One line of an override for a message: control characters as "?", 100 characters, its option alone where it
    holds a secret.
    """
    text = key_of(override) if contains_secret(override) else override
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) < 100 else f"{text[:97]}..."
