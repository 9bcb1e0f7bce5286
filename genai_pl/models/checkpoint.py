"""Reading and writing training checkpoints: data only, never code."""

from pathlib import Path

import torch

from genai_pl.errors import DISK_FULL, CheckpointError, TrainingError
from genai_pl.files import CONTENTS, write_atomic

MARK = "genai_pl"  # the key under which a checkpoint carries what is ours
KINDS = {"model": dict, "tokenizer": dict, "base": str | None, "peft": dict | None, "rng": list}  # what stands there


def read_checkpoint(path: Path) -> dict:
    """The contents of a checkpoint; CheckpointError if it is truncated, foreign, or holds anything but data."""
    contents = read_contents(path)
    if path.is_dir():
        from genai_pl.models import pieces  # DCP takes half a second to import

        return pieces.join(path, contents, {})
    return contents


def read_contents(path: Path) -> dict:
    """The same, but of a checkpoint in pieces the names of its tensors only."""
    in_pieces = path.is_dir()
    try:
        contents = torch.load(path / CONTENTS if in_pieces else path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises whatever its unpickler meets in a broken file
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = "it holds objects that are not data, and would run code to load"
        raise CheckpointError(f"{path}: refused, {reason}") from None
    if not isinstance(contents, dict) or MARK not in contents:
        raise CheckpointError(f"{path}: refused, not a checkpoint of genai_pl")
    strange = _of_another_kind(contents)
    if strange is not None:
        raise CheckpointError(f"{path}: refused, its {strange} is not what genai_pl writes")
    if _names_code(contents):
        raise CheckpointError(f"{path}: refused, its stored configuration names code to run (_target_)")
    if in_pieces:
        from genai_pl.models import pieces

        pieces.check(path, contents)
    return contents


def _of_another_kind(contents: dict) -> str | None:
    """The name of a part that is no part of a checkpoint of ours."""
    ours = contents[MARK]
    if not isinstance(ours, dict):
        return MARK
    if not isinstance(contents.get("state_dict", {}), dict):
        return "state_dict"
    return next((name for name, kind in KINDS.items() if name in ours and not isinstance(ours[name], kind)), None)


def write_checkpoint(contents: dict, path: Path) -> None:
    """Save under a temporary name, flush, rename; TrainingError when the disk is full."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(contents, file)

    try:
        write_atomic(path, save)
    except (OSError, RuntimeError) as error:
        causes = [error, error.__context__]  # torch's zip writer hides the system's error behind its own
        full = any(isinstance(e, OSError) and e.errno in DISK_FULL for e in causes)
        reason = "the disk is full" if full else str(error).splitlines()[0]
        raise TrainingError(f"{path}: the checkpoint could not be written, {reason}") from error


def _names_code(value: object) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(_names_code(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(_names_code(v) for v in value)
    return False
