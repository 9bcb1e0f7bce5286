"""Reading and writing training checkpoints: data only, never code."""

from pathlib import Path

import torch

from genai_pl.atomic_io import CONTENTS, write_atomic
from genai_pl.errors import CheckpointError, TrainingError, reason_of

RESUMED = ("global_step", "epoch", "loops", "callbacks", "optimizer_states", "lr_schedulers")  # what a run goes on with
MOST_SHARED = 1000  # layers that one block's weights may stand for
MARK = "genai_pl"  # the key under which a checkpoint carries what is ours


def read_checkpoint(path: Path) -> dict:
    """The contents of a checkpoint; CheckpointError if it is truncated, foreign, or holds anything but data."""
    contents = read_contents(path)
    if path.is_dir():
        from genai_pl.checkpoints import sharded as shards  # DCP takes half a second to import

        return shards.load_shards(path, contents, {})
    return contents


def read_contents(path: Path) -> dict:
    """The same, but of a checkpoint in pieces the names of its tensors only."""
    sharded = path.is_dir()
    try:
        contents = torch.load(path / CONTENTS if sharded else path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises whatever its unpickler meets in a broken file
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds objects that are not data, and would run code to load"
        raise CheckpointError(f"{path}: refused, {reason}") from None
    if not isinstance(contents, dict) or MARK not in contents:
        raise CheckpointError(f"{path}: refused, not a checkpoint of genai_pl")
    try:
        unsafe = _names_code(contents)
    except RecursionError:
        raise CheckpointError(f"{path}: refused, it is nested too deeply") from None
    if unsafe:
        raise CheckpointError(f"{path}: refused, its stored configuration names code to run (_target_)")
    _check_kinds(path, contents)
    if sharded:
        from genai_pl.checkpoints import sharded as shards

        shards.check_shards(path, contents)
    return contents


def write_checkpoint(contents: dict, path: Path) -> None:
    """Save under a temporary name, flush, rename; TrainingError where the disk refuses it."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(contents, file)

    try:
        write_atomic(path, save)
    except (OSError, RuntimeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else str(error).splitlines()[0]
        raise TrainingError(f"{path}: the checkpoint could not be written, {reason}") from error


def check_resumable(path: Path, contents: dict) -> None:
    """CheckpointError unless a run can be taken up at it."""
    missing = [name for name in RESUMED if name not in contents] + [
        n for n in ("model", "rng") if n not in contents[MARK]
    ]
    if missing:
        raise CheckpointError(f"{path}: refused, it has no {missing[0]}: no training goes on from it")


def _check_kinds(path: Path, contents: dict) -> None:
    """CheckpointError where a part is not of its kind, or of a size that its tensors do not bear out."""
    ours = contents[MARK]
    if not isinstance(ours, dict) or not isinstance(contents.get("state_dict"), dict):
        raise CheckpointError(f"{path}: refused, not a checkpoint of genai_pl")
    kinds = {"global_step": int, "epoch": int, "model": dict, "tokenizer": dict, "base": str, "peft": dict, "rng": list}
    for name, kind in kinds.items():
        value = ours.get(name, contents.get(name))
        if value is not None and not isinstance(value, kind):
            raise CheckpointError(f"{path}: refused, its {name} is not of type {kind.__name__}")
    layers = (ours.get("model") or {}).get("n_layer", 0)
    if isinstance(layers, int) and layers > max(len(contents["state_dict"]), MOST_SHARED):
        raise CheckpointError(f"{path}: refused, it says {layers} layers and has not their weights")


def _names_code(value: object) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(_names_code(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_names_code(v) for v in value)
    return False
