"""Checkpoint files of a run: their order by step, the link to the newest, and their removal."""

import os
import shutil
import sys
import time
from pathlib import Path

from genai_pl.atomic_io import CONTENTS, is_checkpoint, open_temporary
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.errors import CheckpointError


def newest_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the highest step first.

    Steps decide, not modification times: copying a folder may change those. `last.ckpt` and its target are one file
        and appear once.
    """
    paths = [path for path in [*folder.glob("last.ckpt"), *folder.glob("step=*.ckpt")] if is_checkpoint(path)]
    by_inode = {path.stat().st_ino: path for path in paths}
    return sorted(by_inode.values(), key=_step_at_least, reverse=True)


def named_step(path: Path) -> int:
    """The step in a checkpoint's name, -1 where it has none.

    >>> named_step(Path("step=000200.ckpt")), named_step(Path("last.ckpt"))
    (200, -1)
    """
    number = path.name.removeprefix("step=").removesuffix(".ckpt")
    return int(number) if number.isdecimal() else -1


def _step_at_least(path: Path) -> int:
    """The step by name or contents; an unreadable checkpoint sorts before all others, to be reported."""
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
    """Time and step of a checkpoint by its contents; zeros where it cannot be read.

    The time is in Unix seconds, and never later than now: the clock of another machine may be ahead.
    """
    try:
        contents = read_contents(path)
    except CheckpointError:
        return 0.0, 0
    written = contents[MARK].get("saved")
    return min(written if isinstance(written, float) else path.stat().st_mtime, time.time()), contents.get(
        "global_step", 0
    )


def link(path: Path, link: Path) -> None:
    """A second name for a file or folder, put in place by one rename, so that the name always exists.

    A hard link to a file (a copy where the disk has none), a symbolic link to a folder.
    """
    temporary = open_temporary(link)
    try:
        if path.is_dir():
            temporary.symlink_to(path.name)
        else:
            os.link(path, temporary)
    except OSError:
        temporary.write_bytes(path.read_bytes())
    os.replace(temporary, link)
    temporary.unlink(missing_ok=True)  # renaming one name of a file onto another does nothing


def remove_checkpoint_files(path: Path) -> None:
    """Remove a checkpoint; of a folder first the file that makes it one, so that half a folder counts as none."""
    if path.is_dir():
        (path / CONTENTS).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink()
