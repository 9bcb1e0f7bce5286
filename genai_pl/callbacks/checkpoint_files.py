"""Checkpoints of a run as files: which is the newest, by their steps, and the name that points at it."""

import os
import shutil
import sys
import time
from pathlib import Path

from genai_pl.atomic_io import CONTENTS, is_checkpoint, open_temporary
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.errors import CheckpointError


def newest_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run by their steps, the last first; times say nothing of a folder that was copied."""
    paths = [path for path in [*folder.glob("last.ckpt"), *folder.glob("step=*.ckpt")] if is_checkpoint(path)]
    by_inode = {path.stat().st_ino: path for path in paths}
    return sorted(by_inode.values(), key=_step_at_least, reverse=True)


def named_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    number = path.name.removeprefix("step=").removesuffix(".ckpt")
    return int(number) if number.isdecimal() else -1


def _step_at_least(path: Path) -> int:
    """The step of a checkpoint; one that has it neither in its name nor in readable contents stands before all others."""
    if (step := named_step(path)) >= 0:
        return step
    try:
        return step_of(path)
    except CheckpointError:
        return sys.maxsize


def step_of(path: Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return read_contents(path).get("global_step", 0)


def saved_at(path: Path) -> tuple[float, int]:
    """When a checkpoint was written, as it says itself, and its step; zeros where it cannot be read."""
    try:
        contents = read_contents(path)
    except CheckpointError:
        return 0.0, 0
    written = contents[MARK].get("saved")
    return min(written if isinstance(written, float) else path.stat().st_mtime, time.time()), contents.get(
        "global_step", 0
    )


def link(path: Path, link: Path) -> None:
    """A second name for the file or folder, swapped in one rename (a copy where the disk has no hard links)."""
    temporary = open_temporary(link)
    try:
        if path.is_dir():
            temporary.symlink_to(path.name)
        else:
            os.link(path, temporary)
    except OSError:
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, link)
    temporary.unlink(missing_ok=True)  # two names of one file are left as they are: `link` was that of `path`


def remove_checkpoint_files(path: Path) -> None:
    if path.is_dir():
        (path / CONTENTS).unlink(missing_ok=True)  # half a folder is no checkpoint
        shutil.rmtree(path)
    else:
        path.unlink()
