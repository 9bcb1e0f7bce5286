"""Trust in a run folder, which somebody else may have made: plain options count, and nothing that names code or places."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, OverrideType, RangeSweep
from hydra.errors import HydraException

from genai_pl.config.redaction import contains_secret
from genai_pl.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
TRUSTED_GROUPS = {  # of whose fields each may be set
    *("model", "data", "tokenizer", "objective", "peft", "optimizer", "scheduler"),
    *("precision", "strategy", "trainer", "generation", "plan"),
}
TRUSTED_CALLBACKS = {"checkpoint", "samples", "export"}  # `extra` names code, but for fields of ours
# options that each command gives anew: they are never taken from a saved run
PER_COMMAND = {"resume", "dry_run", "output_dir", "hydra.run.dir", "hydra.sweep.dir", "hydra.mode"}
MAX_BYTES, MAX_OVERRIDES = 2**18, 500  # of one file
MAX_OVERRIDE_CHARS, MAX_BRACKETS = 2**12, 20  # of one override
CHOICE_NAME = re.compile(r"[\w-]+")
FUNCTION_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function


class _ReferenceFreeLoader(yaml.SafeLoader):
    """YAML without references, a few of which can stand for gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references are not read")
        return super().compose_node(parent, index)


def read_untrusted_yaml(path: Path) -> object:
    """The contents of a small YAML file; UserError if it is anything else, which quotes nothing of it."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: cannot be read (not a file of at most {MAX_BYTES // 1024} KiB)")
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_ReferenceFreeLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__})") from None


def read_overrides(path: Path, *keys: str) -> list[str]:
    """The list of overrides in a file, under these keys of it; UserError if there is none."""
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
    """The option that an override is of."""
    return argument.partition("=")[0].lstrip("+~")


def trusted_overrides(overrides: Iterable[str], path: Path, arguments: Sequence[str]) -> list[str]:
    """The overrides of a file that count beside a command line: those it gives itself do not; UserError for what is not plain."""
    typed_keys = {key_of(a) for a in arguments}
    kept = [o for o in overrides if key_of(o) not in typed_keys | PER_COMMAND]
    if refused := untrusted_overrides(kept, arguments):
        reasons = "; ".join(f"{_printable(o)} {reason}" for o, reason in refused.items())
        raise UserError(f"{path}: {reasons}; what of that you trust must be typed again on the command line")
    return kept


def untrusted_overrides(overrides: Iterable[str], arguments: Sequence[str]) -> dict[str, str]:
    """The overrides that count only where they are typed, each with the reason."""
    folders = [CONF, *user_config_folders(arguments)]
    return {o: reason for o in overrides if (reason := _distrust_reason(o, folders))}


def check_links(run: Path) -> None:
    """UserError where something that a run writes is a link to a place outside of its folder."""
    paths = [p for folder in (run, run / ".hydra", run / "checkpoints") if folder.is_dir() for p in folder.iterdir()]
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(run.resolve()):
            raise UserError(
                f"{path}: a link out of the run folder, which would be written to; put the thing itself there"
            )


def names_user_code(arguments: Sequence[str]) -> bool:
    """Whether a command line names code of the user's own, or a folder with options that may."""
    functions = (re.search(FUNCTION_NAME, a.partition("=")[2]) for a in arguments if key_of(a).startswith("objective."))
    return any("_target_" in a for a in arguments) or any(functions) or bool(user_config_folders(arguments))


def user_config_folders(arguments: Sequence[str]) -> list[Path]:
    """The folders with options that a command line names."""
    paths = [value for name, value in pairwise(arguments) if name in ("--config-dir", "-cd")]
    paths += [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    search_paths = [a.partition("=")[2] for a in arguments if key_of(a) == "hydra.searchpath"]
    paths += [path for text in search_paths for path in re.findall(r"file://([^'\",\]]+)", text)]
    return [Path(folder).resolve() for folder in paths]


def _distrust_reason(text: str, folders: Sequence[Path]) -> str | None:
    """Why an override is not plain, or None."""
    if contains_secret(text):
        return "holds a secret"
    try:
        override = OverridesParser.create().parse_override(text)
        values = _values(override)
    except (HydraException, ValueError, RecursionError):
        return "is not understood"
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
    if "/" in key or any((folder / key).is_dir() for folder in folders):
        all_shipped = all(_is_choice(key, value, folders) for value in values)
        return None if all_shipped else "is not an option of ours"
    return _field_distrust_reason(parts, values)


def _shipped_callback_fields() -> set[tuple[str, ...]]:
    """The fields of the further callbacks that are files of ours."""
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CONF / "callbacks").glob("*.yaml")]
    entries = [(name, fields) for file in files for name, fields in file.get("extra", {}).items()]
    return {(name, field) for name, fields in entries for field in fields}


def _values(override: Override) -> list[object] | None:
    """What an override sets, one value for each job of a sweep; None where that is not known."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [str(v) if isinstance(v, str) else v for v in value.list]
    if isinstance(value, RangeSweep):
        return [value.start, value.stop, value.step]
    return None if override.is_sweep_override() else [value]


def _is_choice(group: str, value: object, folders: Sequence[Path]) -> bool:
    if value is None or value == []:
        return True
    if not isinstance(value, str) or not CHOICE_NAME.fullmatch(value):
        return False
    return group in ("hydra/launcher", "hydra/sweeper") or any(
        (folder / group / f"{value}.yaml").is_file() for folder in folders
    )


def _field_distrust_reason(parts: list[str], values: list[object]) -> str | None:
    leaves = [leaf for value in values for leaf in _leaves(value)]
    if parts[0] == "hydra":  # launchers take shell commands too
        numbers = len(parts) == 3 and all(isinstance(leaf, int | float) for leaf in leaves)
        return None if numbers else "changes Hydra: what a launcher runs"
    options = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    is_root = len(parts) == 1 and parts[0] in options.keys() - {"defaults", "hydra"}
    if not (
        is_root or parts[0] in TRUSTED_GROUPS or (parts[0] == "callbacks" and parts[1] in {*TRUSTED_CALLBACKS, "extra"})
    ):
        return "is not a plain option"
    texts = [leaf for leaf in leaves if isinstance(leaf, str)]
    if parts[0] == "objective" and any(FUNCTION_NAME.fullmatch(text) for text in texts):
        return "names code to run"
    return "is a network address" if any("://" in text for text in texts) else None


def _leaves(value: object) -> Iterable[object]:
    """Everything in a value, keys too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *_leaves(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _printable(override: str) -> str:
    """The override on one line, without what a terminal would obey; no more than its option where it holds a secret."""
    text = key_of(override) if contains_secret(override) else override
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) < 100 else f"{text[:97]}..."
