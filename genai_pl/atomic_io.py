"""Atomic files and folders: a reader sees the old one or the new one, never half of one.

Everything that a command leaves behind (checkpoints, exported models, tables, caches) is written under a temporary
name beside its target, flushed to disk and renamed. The temporary name holds host and process id, by which the next
writer knows what a killed one
left. Also here: the lock of a run folder, and the names of files by which folders are recognized.
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from genai_pl.errors import UserError, system_error

SWEEP = "multirun.yaml"  # written by Hydra before the first job of a sweep
LOCK = ".lock"  # in a run folder: the process that writes it
UNFINISHED: set[Path] = set()  # temporaries that this process is writing
ADAPTER = "adapter_config.json"  # a folder with it is an adapter
CONTENTS = "contents.pt"  # a folder with it is a sharded checkpoint: all of that but its tensors
RESULTS = "results.json"  # last step and metrics of a run that reached its end


def is_checkpoint(path: Path) -> bool:
    """Whether the path looks like a training checkpoint: a file, or a folder of shards."""
    return path.is_file() or (path / CONTENTS).is_file()


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file or folder beside `path`, flush it and rename it; on failure it is removed.

    The next writer of `path` on this machine removes what a killed one left. A folder needs two renames to replace:
    killed between them, the old one waits under a hidden name, which the next writer undoes. An error of the disk is
    an OSError that names `path`, whichever library raised it.
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
    """A context in which errors of the operating system become OSErrors that name `path`."""
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if found is None:
            raise
        raise OSError(found.errno, os.strerror(found.errno), str(path)) from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A context that holds a run folder for this process; UserError with the id of the process that holds it already.

    The lock is fcntl's on a file: the kernel releases it when the process dies, and children do not inherit it.
    """
    path = folder / LOCK
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("ab+", buffering=0)  # unbuffered: closing writes nothing
        try:
            # take the lock, or name its owner
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                file.seek(0)
                owner = file.read(100).decode(errors="replace").strip() or "another"
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
            raise UserError(f"{folder}: process {owner} is writing this run; wait for it, or end it") from None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # its owner has removed it meanwhile: lock the new file
    with file:
        with naming(path):
            # write the owner, for the message above
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
        try:
            yield
        finally:
            with suppress(OSError):  # a disk that has become read-only has raised before
                path.unlink(missing_ok=True)


def open_temporary(path: Path) -> Path:
    """A temporary path beside `path`, for what will replace it; leftovers of killed writers are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _beside(path, "tmp")
    UNFINISHED.add(temporary)
    return temporary


def commit(temporary: Path, path: Path) -> None:
    """Flush a temporary file or folder and rename it to `path`, the folder entry flushed too."""
    for part in [temporary, *temporary.rglob("*")]:
        _sync(part)
    _replace(path, temporary)
    UNFINISHED.discard(temporary)
    _sync(path.parent)


def remove_unfinished() -> None:
    """Remove the temporaries of this process, for one that ends without unwinding."""
    for temporary in list(UNFINISHED):
        _remove(temporary)


def _replace(path: Path, temporary: Path) -> None:
    """Rename a temporary to `path`; a folder that is there is moved aside first, and back if that fails."""
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
    """A hidden name beside `path`, of this host and process."""
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
    """Whether another process has this id; an equal id to ours was that of a dead process."""
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
    """Remove a file or folder; errors are left to the next writer."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    """Flush a file or folder entry to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
