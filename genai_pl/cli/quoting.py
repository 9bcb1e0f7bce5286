"""Quoting of override values: texts as a user types them, in the quotes that Hydra's grammar needs.

Hydra parses `data.path=a (1).txt` as a function call and `prompt=1e3` as a number. Which options are texts is known
from the schemas, so their values can be quoted here; the user quotes for the shell alone. Two kinds: options that
are never anything but text (prompts, regular expressions) are always quoted; other texts (paths, names) only if
Hydra would change them, because a comma-separated list there is a sweep.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from genai_pl.cli.schema import SCHEMAS
from genai_pl.errors import ConfigError
from genai_pl.training.hydra_job import quote_for_hydra

FLAGS = (  # Hydra's own
    *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion"),
    *("config-path", "config-name", "config-dir", "experimental-rerun", "info"),
)
VERBATIM_OPTIONS = (
    "prompt",
    "system",
    "rubric",
    "peft.init_text",
    "generation.prefix",
    "generation.regex",
    "generation.json_schema",
)  # never YAML
UNTYPED_TEXT_OPTIONS = (
    "tokenizer.name",
    "peft.init_from",
    "objective.critic",
    "objective.teacher",
    "objective.reference_cache",
    "objective.teacher_cache",
    "hydra.run.dir",
    "adapter",
)
GROUP_PREFIXES = {"plan": "plan.", "model": "model.", "wrapped": "model.", "generation": "generation."}
DATA_KINDS = ("data", "pairs", "seq2seq", "chat", "preference", "unpaired", "prompts")
LIST_ENTRY = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,'"\[\]{}])+""")


def quote_argument(argument: str) -> str:
    """The argument with quotes around its value where it is a text that Hydra would not take as typed.

    >>> quote_argument("data.path=a (1).txt"), quote_argument("generation.stop=[true,b]"), quote_argument("model.n_layer=2")
    ("data.path='a (1).txt'", "generation.stop=['true',b]", 'model.n_layer=2')
    """
    key, equals, value = argument.partition("=")
    if not equals or is_quoted(value) or value in ("", "null"):
        return argument
    name = key.lstrip("+")
    if name in VERBATIM_OPTIONS or ("=" in value and value[0] not in "'\"[{"):
        return f"{key}={quote_for_hydra(value)}"
    if name in TEXT_LIST_OPTIONS and value[0] + value[-1] == "[]":
        return f"{key}=[{_quote_entries(value[1:-1])}]"
    return f"{key}={_quote_text(value)}" if name in TEXT_OPTIONS else argument


def is_quoted(value: str) -> bool:
    """True if a value is in quotes already."""
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _quote_text(value: str) -> str:
    """A path or name, quoted if Hydra would refuse it, or read a number, truth value or sweep, and a file has that
    name.

    A sweep stays a sweep unless the whole word names an existing file.
    """
    override = _parse(value)
    if override is None or _has_type(override, bool, int, float):
        return quote_for_hydra(value)
    is_plain = not override.is_sweep_override() and override.value() == value
    return value if is_plain or not Path(value).expanduser().exists() else quote_for_hydra(value)


def _has_type(override: Override, *kinds: type) -> bool:
    """True if an override sets one value, of one of these types."""
    return not override.is_sweep_override() and isinstance(override.value(), kinds)


def _quote_entries(inside: str) -> str:
    """The entries of a list of texts, each quoted like a text on its own; unchanged if it nests or is quoted
    oddly.
    """
    entries = [entry.strip() for entry in LIST_ENTRY.findall(inside)]
    if ",".join(entries) != re.sub(r"\s*,\s*", ",", inside.strip()):
        return inside
    return ",".join(
        entry if is_quoted(entry) else quote_for_hydra(entry) if entry == "null" else _quote_text(entry)
        for entry in entries
    )


def _parse(value: str) -> Override | None:
    """The override that Hydra reads from a value; None if its grammar refuses it."""
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def _fields(schema: type, prefix: str) -> Iterator[tuple[str, set[object]]]:
    """(dotted name, types) of all fields of a schema, nested ones too; `str | None` has two types."""
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")
        yield f"{prefix}{name}", set(get_args(kind)) if isinstance(kind, UnionType) else {kind}


def _options_of(*kinds: object) -> set[str]:
    """Names of the options whose annotation allows these types and null only."""
    schemas = [
        (schema, GROUP_PREFIXES.get(name, "data." if name in DATA_KINDS else "")) for name, schema in SCHEMAS.items()
    ]
    fields = [field for schema, prefix in schemas for field in _fields(schema, prefix)]
    return {name for name, types in fields if types <= {*kinds, type(None)} and set(kinds) & types}


TEXT_OPTIONS = _options_of(str) | set(UNTYPED_TEXT_OPTIONS)
TEXT_LIST_OPTIONS = _options_of(list[str])


def check_flags(arguments: Sequence[str]) -> None:
    """ConfigError for `--name`, as other programs write options; Hydra's own flags pass."""
    for n, word in enumerate(arguments):
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name or any(flag.startswith(name) for flag in FLAGS):
            continue
        after = arguments[n + 1] if n + 1 < len(arguments) and not value else ""
        if not value and "=" not in after and not after.startswith("-"):
            value = after
        raise ConfigError(f"--{name}: options are written name=value: {name.replace('-', '_')}={value or 'VALUE'}")
