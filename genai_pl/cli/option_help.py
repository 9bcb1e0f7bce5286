"""Help texts: options, choices and comments of a command, read from conf/ and from the dataclasses behind it.

Hydra's `--help` prints one composed configuration. Here `--help` lists groups with their choices, `--help GROUP`
explains them, `--help GROUP=CHOICE` and `--help OPTION` show fields. The texts are the comments of the YAML files,
and for `model` and `generation` those of the dataclasses, read as source: importing nothing keeps this under a
second, and docs/configuration.md is made of the same.
"""

import ast
import shutil
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import yaml

from genai_pl.errors import ConfigError
from genai_pl.training.trust import CONF, user_config_folders

HELP_FLAGS = ("--help", "-h")
MAX_WIDTH = 140  # characters of a line
GROUP_DATACLASSES = {
    "model": ("ModelConfig", "RopeScaling"),
    "generation": ("GenerationConfig",),
}  # of whose fields a group has
MODULES = {
    "ModelConfig": "model",
    "RopeScaling": "rope_scaling",
    "GenerationConfig": "generation",
}  # of genai_pl/config
SHOWN_DEFAULTS = {"field(default_factory=list)": "[]", "field(default_factory=dict)": "{}", "()": "[]"}


class Field(NamedTuple):
    """One option: its dotted name, its value where nobody sets it, and the comment that explains it."""

    name: str
    value: str
    meaning: str


def read_yaml_fields(path: Path) -> tuple[str, list[Field]]:
    """First comment line of a YAML file, and its fields in order; parents by indentation of two spaces.

    A line parser and not a YAML parser, because the comments are the point. The files of conf/ are written so
    that it reads them:
    `name: value # meaning`, one field a line. Fields with a leading underscore, `defaults` and `hydra` are left
    out.
    """
    head, fields, parents, base = "", [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            head = head or (text.lstrip("# ") if text != "# @package _global_" else "")
            continue
        # fields of a mapping in a list count from the list's entry on
        depth = (len(line) - len(line.lstrip())) // 2
        if text.startswith("-"):
            parents, base = [], depth + 1  # an entry of a list
        if not text or text.startswith("-") or ":" not in text:
            continue
        base = base if depth >= base else 0
        depth -= base
        name, _, rest = text.partition(":")
        value, _, meaning = rest.partition(" # ")
        parents = [*parents[:depth], name]
        if parents[0] in ("defaults", "hydra") or name.startswith("_"):
            continue
        if value.strip() or meaning:
            fields.append(Field(".".join(parents), value.strip(), meaning.strip()))
    return head, fields


def read_dataclass_fields(name: str) -> list[Field]:
    """Fields of a dataclass of genai_pl/config by its source text: name, default as typed, trailing comment."""
    source = (CONF.parent / "genai_pl" / "config" / f"{MODULES[name]}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    fields = []
    for entry in (n for n in node.body if isinstance(n, ast.AnnAssign)):
        default = "" if entry.value is None else ast.get_source_segment(source, entry.value)
        value = default.replace("None", "null").replace("True", "true").replace("False", "false")
        value = value.rpartition(".")[2] if value[:1].isupper() else SHOWN_DEFAULTS.get(value, value)
        meaning = lines[entry.end_lineno - 1].partition("  # ")[2]
        fields.append(Field(entry.target.id, "" if value.startswith("field(") else value, meaning.strip()))
    return fields


def help_text(config_name: str, arguments: Sequence[str]) -> str:
    """Text of `--help`: everything, or what the other words of the command line name.

    config_name: the command's file in conf/. arguments: its command line, which may name user folders with more
    choices.
    """
    path = CONF / f"{config_name}.yaml"
    contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    texts, groups = contents["hydra"]["help"], _groups(contents["defaults"])
    folders = [CONF, *user_config_folders(arguments)]
    paths = {str(folder) for folder in user_config_folders(arguments)}
    words = [
        a for a in arguments if a not in HELP_FLAGS and not a.startswith("-") and str(Path(a).resolve()) not in paths
    ]
    if words:
        fields = read_yaml_fields(path)[1]
        return "\n\n".join(_of_word(word, groups, fields, folders) for word in words)
    # the whole command: groups, then its own options
    app = texts["app_name"]
    lines = [texts["header"], "", f"python {app} [GROUP=CHOICE ...] [OPTION=VALUE ...]", ""]
    if groups:
        lines += [f"Groups, the default choice marked *; {app} --help GROUP says more, --help GROUP=CHOICE all:"]
        rows = [(group, _choices(group, chosen, folders)) for group, chosen in groups.items()]
        lines += [*_columns([(f"  {group}", text) for group, text in rows]), ""]
    lines += ["Options, and their values where they are not given:", *_rows(read_yaml_fields(path)[1]), ""]
    return "\n".join([*lines, "Examples:", *(f"  {line}" for line in texts["footer"].splitlines())])


def _groups(defaults: list[object]) -> dict[str, str | None]:
    """Groups of a command, each with its default choice; schemas, which hold a slash, are left out."""
    entries = [next(iter(entry.items())) for entry in defaults if isinstance(entry, dict)]
    return {group: choice for group, choice in entries if "/" not in group}


def _of_word(word: str, groups: dict[str, str | None], fields: list[Field], folders: list[Path]) -> str:
    """Help for one word: a group, a choice of one, an option or a part of an option's name. ConfigError for
    anything else.
    """
    name, equals, choice = word.partition("=")
    group = name.partition(".")[0]
    if name in groups and equals and choice:
        return _of_choice(name, choice, folders)
    # a group: its choices, and the fields of all or of the default one
    if name in groups:
        heads = {path.stem: read_yaml_fields(path)[0] for path in _files(name, folders)}
        lines = _columns([(f"  {name}={stem}{_mark(stem, groups[name])}", head) for stem, head in heads.items()])
        fields = _common(name) or _of_chosen(name, groups[name], folders)
        heading = "every choice" if _common(name) else f"{name}={groups[name]}"
        return "\n".join([f"{name}, the default choice marked *:", *lines, *_fields_of(heading, fields, name)])
    # an option inside a group
    if group in groups:  # GROUP.field
        fields_of_group = {field.name: field for field in (*_common(group), *_of_chosen(group, groups[group], folders))}
        fields = [*fields, *(field._replace(name=f"{group}.{name}") for name, field in fields_of_group.items())]
    matching = [field for field in fields if field.name == name or field.name.startswith(f"{name}.")]
    if matching:
        return "\n".join(_rows(matching))
    names = [*groups, *(field.name for field in fields)]
    matches = get_close_matches(name, names, n=1, cutoff=0.5)
    raise ConfigError(f"{name}: no such group or option{f', did you mean {matches[0]}?' if matches else ''}")


def _of_choice(group: str, choice: str, folders: list[Path]) -> str:
    """Help for `GROUP=CHOICE`: the fields that its file sets, then those of every choice."""
    path = next((path for path in _files(group, folders) if path.stem == choice), None)
    if path is None:
        names = ", ".join(path.stem for path in _files(group, folders))
        raise ConfigError(f"{group}={choice}: no such option; {group} is one of {names}")
    prefix = "" if "# @package _global_" in path.read_text(encoding="utf-8") else group
    meanings = {field.name: field.meaning for field in _common(group)}
    fields = [field._replace(meaning=field.meaning or meanings.get(field.name, "")) for field in _inherited(path)]
    common = [field for field in _common(group) if field.name not in {name for name, _, _ in fields}]
    lines = [f"{group}={choice}  {read_yaml_fields(path)[0]}", *_fields_of("", fields, prefix)]
    return "\n".join([*lines, *(_fields_of("every choice", common, group) if common else [])])


def _fields_of(heading: str, fields: list[Field], group: str) -> list[str]:
    """A headed table of fields with their full names; [] without fields."""
    full_names = [field._replace(name=f"{group}.{field.name}" if group else field.name) for field in fields]
    return ["", f"Fields of {heading}:" if heading else "Fields:", *_rows(full_names)] if fields else []


def _of_chosen(group: str, choice: str | None, folders: list[Path]) -> list[Field]:
    """Fields of a group's chosen file; [] if it has none."""
    return next((_inherited(path) for path in _files(group, folders) if path.stem == choice), [])


def _inherited(path: Path) -> list[Field]:
    """Fields of a file and of the files in its defaults list; its own values win, meanings are inherited."""
    contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields_by_name: dict[str, Field] = {}
    for entry in contents.get("defaults", []) if isinstance(contents, dict) else []:
        parent = path.parent / f"{entry}.yaml"
        if isinstance(entry, str) and parent.is_file():
            fields_by_name |= {field.name: field for field in _inherited(parent)}
    for field in read_yaml_fields(path)[1]:
        meaning = field.meaning or (fields_by_name[field.name].meaning if field.name in fields_by_name else "")
        fields_by_name[field.name] = field._replace(meaning=meaning)
    return list(fields_by_name.values())


def _common(group: str) -> list[Field]:
    """Fields that every choice of a group has, from the dataclass behind it; [] for groups without one."""
    classes = GROUP_DATACLASSES.get(group, ())
    inner = [
        field._replace(name=f"rope_scaling.{field.name}")
        for name in classes[1:]
        for field in read_dataclass_fields(name)
    ]
    return [*(field for name in classes[:1] for field in read_dataclass_fields(name)), *inner]


def _files(group: str, folders: list[Path]) -> list[Path]:
    """Option files of a group, shipped ones first."""
    return [path for folder in folders for path in sorted((folder / group).glob("*.yaml"))]


def _choices(group: str, chosen: str | None, folders: list[Path]) -> str:
    """Names of a group's choices in one line, the default marked."""
    return ", ".join(f"{path.stem}{_mark(path.stem, chosen)}" for path in _files(group, folders))


def _mark(choice: str, chosen: str | None) -> str:
    return "*" if choice == chosen else ""


def _rows(fields: list[Field]) -> list[str]:
    """Table rows of fields; a mandatory value (???) is shown as required."""
    rows = []
    for name, value, meaning in fields:
        must = value == "???"
        rows.append((f"  {name}={'' if must else value}", f"required: {meaning}" if must else meaning))
    return _columns(rows)


def _columns(rows: list[tuple[str, str]]) -> list[str]:
    """Two columns; the second is wrapped to the terminal's width, and a long first cell gets a line of its own."""
    width = min(MAX_WIDTH, shutil.get_terminal_size((120, 24)).columns)
    start = min(max((len(name) for name, _ in rows), default=0), max(2 * width // 5, 28)) + 2
    lines = []
    for name, text in rows:
        broken = textwrap.wrap(text, max(width - start, 20), break_on_hyphens=False) or [""]
        if len(name) > start - 2:
            lines.append(name)
            name = ""
        lines += [f"{name.ljust(start)}{broken[0]}".rstrip(), *(" " * start + line for line in broken[1:])]
    return lines
