"""Default optimizer of a run that starts from weights of others: that of fine-tuning, not that of random weights.

Models of the hub were trained with AdamW, and a step that suits random weights undoes much of what they know. Runs of this
project go on with the default that made them: fine-tuning with Muon pays where pretraining was with Muon, and not otherwise
(Liu et al. 2025, Muon is Scalable for LLM Training, 3.5.3).
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import yaml

from genai_pl.training.trust import CONF, key_of, user_config_folders, value_of

FINETUNE = "finetune"  # option of the group `optimizer`
NONE = ("", "null", "None")


def with_default_optimizer(arguments: list[str]) -> list[str]:
    """The arguments with optimizer=finetune where weights of others are trained and nothing chooses an optimizer."""
    values = {key_of(a): value_of(a) for a in arguments}
    name = values.get("init_from", "")
    names = [name] if Path(name).exists() else name.split(",")  # values of a sweep
    is_foreign = values.get("model") == "hf" or any(map(is_of_others, names))
    if not is_foreign or chooses_optimizer(values, arguments):
        return arguments
    # beside the other overrides: argparse takes positional words in one row only
    place = next(n for n, a in enumerate(arguments) if "=" in a and not a.startswith("-"))
    return [*arguments[:place], f"optimizer={FINETUNE}", *arguments[place:]]


def default_line(lr: float, choice: str, typed: Sequence[str]) -> str | None:
    """A line on the optimizer of trained weights, where the command line has not chosen it; choice: of the group."""
    if choice != FINETUNE or any(key_of(a) == "optimizer" for a in typed):
        return None
    return f"optimizer   {FINETUNE}, AdamW at lr {lr:g}: the default for trained weights (optimizer=, optimizer.lr=)"


def is_of_others(reference: str) -> bool:
    """Whether a reference names a Hugging Face folder or a hub id, and nothing that a run here has written.

    >>> is_of_others("Qwen/Qwen3-0.6B"), is_of_others("auto"), is_of_others("runs/base"), is_of_others("mine/best")
    (True, False, False, False)
    """
    from genai_pl.references import CHECKPOINTS, is_hub_id, is_run

    path = Path(reference).expanduser()
    if reference in NONE:
        return False
    if path.exists():
        return (path / "config.json").is_file() and not is_run(path.resolve().parent)
    return is_hub_id(reference) and path.name not in CHECKPOINTS


def chooses_optimizer(values: dict[str, str], arguments: Sequence[str]) -> bool:
    """Whether a command line chooses an optimizer: by name, with an adapter or experiment, or an objective that has one.

    values: of the arguments by option.
    """
    if any(key.partition("@")[0] == "optimizer" for key in values) or values.get("experiment", "null") not in NONE:
        return True
    chosen = [(group, values[group]) for group in ("peft", "objective", "data", "model") if group in values]
    folders = (CONF, *user_config_folders(arguments))
    files = chain.from_iterable(
        [folder / group / f"{name}.yaml" for folder in folders for name in names.split(",")] for group, names in chosen
    )
    return any(_overrides_optimizer(file) for file in files if file.is_file())


def _overrides_optimizer(file: Path) -> bool:
    """Whether a file of options chooses the optimizer in its list of defaults."""
    contents = yaml.safe_load(file.read_text(encoding="utf-8"))
    entries = contents.get("defaults", []) if isinstance(contents, dict) else []
    keys = [str(key) for entry in entries if isinstance(entry, dict) for key in entry]
    return any(key.removeprefix("override ").lstrip("/").partition("@")[0] == "optimizer" for key in keys)
