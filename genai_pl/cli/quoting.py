"""Values of the command line as they are typed: quotes around what Hydra's grammar would refuse or turn into something else."""

import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from genai_pl.cli.schema import NODES
from genai_pl.training.hydra_job import quote

TEXTS = (
    "prompt",
    "system",
    "rubric",
    "peft.init_text",
    "generation.prefix",
    "generation.regex",
    "generation.json_schema",
)  # never YAML
UNTYPED = (
    "tokenizer.name",
    "peft.init_from",
    "objective.critic",
    "objective.reference_cache",
    "hydra.run.dir",
    "adapter",
)
GROUPS = {"plan": "plan.", "model": "model.", "wrapped": "model.", "generation": "generation."}
TRAINING = ("data", "pairs", "seq2seq", "chat", "preference", "unpaired", "prompts")
ENTRY = re.compile(r"""(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^,'"\[\]{}])+""")


def quoted(argument: str) -> str:
    """The argument with quotes where the value is text that Hydra would not take as it is typed.

    >>> quoted("data.path=a (1).txt"), quoted("generation.stop=[true,b]"), quoted("model.n_layer=2")
    ("data.path='a (1).txt'", "generation.stop=['true',b]", 'model.n_layer=2')
    """
    key, equals, value = argument.partition("=")
    if not equals or is_quoted(value) or value in ("", "null"):
        return argument
    name = key.lstrip("+")
    if name in TEXTS or ("=" in value and value[0] not in "'\"[{"):
        return f"{key}={quote(value)}"
    if name in LISTS and value[0] + value[-1] == "[]":
        return f"{key}=[{_entries(value[1:-1])}]"
    return f"{key}={_as_typed(value)}" if name in STRINGS else argument


def is_quoted(value: str) -> bool:
    """Whether the value stands in quotes."""
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _as_typed(value: str) -> str:
    """The value of an option that is text; what Hydra reads in another way stays, such as a sweep, unless a file is called so."""
    found = _parsed(value)
    if found is None or _parsed_to(found, bool, int, float):
        return quote(value)
    plain = not found.is_sweep_override() and found.value() == value
    return value if plain or not Path(value).expanduser().exists() else quote(value)


def _parsed_to(found: Override, *kinds: type) -> bool:
    return not found.is_sweep_override() and isinstance(found.value(), kinds)


def _entries(inside: str) -> str:
    """The entries of a list of texts."""
    entries = [entry.strip() for entry in ENTRY.findall(inside)]
    if ",".join(entries) != re.sub(r"\s*,\s*", ",", inside.strip()):
        return inside
    return ",".join(
        entry if is_quoted(entry) else quote(entry) if entry == "null" else _as_typed(entry) for entry in entries
    )


def _parsed(value: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return None


def _fields(node: type, prefix: str) -> Iterator[tuple[str, set[object]]]:
    """The dotted names of the fields of a node, and the types that they may have."""
    for name, kind in get_type_hints(node).items():
        if is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{name}.")
        yield f"{prefix}{name}", set(get_args(kind)) if isinstance(kind, UnionType) else {kind}


def _names(*kinds: object) -> set[str]:
    """The options whose values are of these kinds or null."""
    nodes = [(node, GROUPS.get(name, "data." if name in TRAINING else "")) for name, node in NODES.items()]
    fields = [field for node, prefix in nodes for field in _fields(node, prefix)]
    return {name for name, found in fields if found <= {*kinds, type(None)} and set(kinds) & found}


STRINGS = _names(str) | set(UNTYPED)
LISTS = _names(list[str])
