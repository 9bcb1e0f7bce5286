"""Writing so that a reader sees the old file or the new one, never half of one."""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genai_pl.errors import UserError, system_error

SWEEP = "multirun.yaml"  # which Hydra writes before the first job of a sweep
LOCK = ".lock"  # of a run folder: who writes it
UNFINISHED: set[Path] = set()  # temporaries that this process is writing
ADAPTER = "adapter_config.json"  # what makes a folder an adapter
CONTENTS = "contents.pt"  # what makes a folder a checkpoint: all of it that is no tensor
RESULTS = "results.json"  # of a run that reached its end: its last step and what it measured there


def is_checkpoint(path: Path) -> bool:
    """Whether the path looks like a training checkpoint: a file, or a folder of shards."""
    return path.is_file() or (path / CONTENTS).is_file()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file or folder beside `path`, flush it and rename it; on failure it is removed.

    What a killed writer leaves is removed by the next one that writes `path` on this machine. A folder needs two
    renames to replace: killed between them, the old one waits under a hidden name, which the next writer undoes.
    What the disk refuses is an OSError that names `path`, whatever library met it.
    """
    temporary = open_temporary(path)
    try:
        with naming(path):
            write(temporary)
            commit(temporary, path)
    finally:
        _remove(temporary)
        UNFINISHED.discard(temporary)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, what the operating system refuses is an OSError that names `path`."""
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if found is None:
            raise
        raise OSError(found.errno, os.strerror(found.errno), str(path)) from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; UserError that names the process which holds it."""
    path = folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("ab+", buffering=0)  # nothing is left to be written when it is closed
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, and is not left to its children
        except OSError as error:
            with file:
                file.seek(0)
                owner = file.read(100).decode(errors="replace").strip() or "another"
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
            raise UserError(f"{folder}: process {owner} is writing this run; wait for it, or end it") from None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # its owner has removed it in between
    with file:
        with naming(path):
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # a disk that is read-only by now has said so
                path.unlink(missing_ok=True)


def open_temporary(path: Path) -> Path:
    """A name beside `path` for what is to take its place; what killed writers left there is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _beside(path, "tmp")
    UNFINISHED.add(temporary)
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Flush the file or folder and give it the name of `path`."""
    for part in [temporary, *temporary.rglob("*")]:
        _sync(part)
    _replace(path, temporary)
    UNFINISHED.discard(temporary)
    _sync(path.parent)


def remove_unfinished() -> None:
    """Remove what this process is writing under temporary names: for one that ends without unwinding."""
    for temporary in list(UNFINISHED):
        _remove(temporary)


def _replace(path: Path, temporary: Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    old = path.rename(_beside(path, "old"))
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    _remove(old)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{_prefix(path, kind)}{os.getpid()}")


def _prefix(path: Path, kind: str) -> str:
    return f".{path.name}.{kind}-{socket.gethostname()}-"


def _remove_leftovers(path: Path) -> None:
    """Undo what killed writers of `path` left: give a folder back its name, remove temporaries."""
    for kind in ("old", "tmp"):
        prefix = _prefix(path, kind)
        for leftover in [p for p in path.parent.iterdir() if p.name.startswith(prefix)]:
            pid = leftover.name.removeprefix(prefix)
            if not pid.isdigit() or _is_running(int(pid)):
                continue
            if kind == "old" and not path.exists():
                leftover.rename(path)
            else:
                _remove(leftover)


def _is_running(pid: int) -> bool:
    """Whether another process has this id; ours is free: a dead one had it before us."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or folder, if the disk lets us: what it refuses, whoever writes next is told."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
