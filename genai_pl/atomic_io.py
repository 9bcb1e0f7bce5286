"""Atomic files: a reader sees the old contents or the new ones, never half of them.

A file or folder is written under a temporary name beside its place, flushed with fsync, and renamed: rename is
atomic on POSIX file systems, and fsync before it keeps a power loss from leaving an empty file under the final
name. Temporary names hold host and process id, so that the next writer can remove what a killed one left. `claimed`
is a lock on a run folder: two processes that write the same checkpoints would each delete the other's.
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
    """True if a path looks like a training checkpoint: a file, or a folder with the index of a sharded one.
    Nothing is read.
    """
    return (path.is_file() and not is_gguf(path)) or (path / CONTENTS).is_file()


def is_gguf(path: Path) -> bool:
    """True if a path is that of a GGUF file, llama.cpp's format, by its name."""
    return path.suffix == ".gguf" and path.is_file()


def write_atomic(path: Path, write: Callable[[Path], object], *, keep: bool = False) -> None:
    """Let `write` fill a temporary file or folder beside `path`, then flush it and rename it to `path`.

    On failure the temporary is removed and the old contents stay. What a killed writer left on this machine is
    removed first. A folder takes two renames to replace; killed between them, the old one keeps a hidden name,
    and the next writer renames it back. An error of the operating system becomes an OSError that names `path`,
    whichever library raised it. keep: a folder that another process has put there meanwhile stays, and ours is removed.
    """
    temporary = open_temporary(path)
    try:
        with naming(path):
            write(temporary)
            commit(temporary, path, keep=keep)
    finally:
        _remove(temporary)
        UNFINISHED.discard(temporary)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context in which errors of the operating system become an OSError that names `path`: a full disk is reported
    for the checkpoint, not for a temporary file.
    """
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if found is None:
            raise
        raise OSError(found.errno, os.strerror(found.errno), str(path)) from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Context that holds a run folder for this process; UserError, with the owner's process id, if another process
    holds it.

    The lock is a POSIX record lock, which the kernel releases when the process ends, however it ends, and which
    children do not inherit. The file holds "PID on HOST" for messages.
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
        # the owner may have removed the file between open and lock: then this lock is on a deleted file
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
    """A temporary name beside `path` to write to; removes what killed writers of `path` left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = _beside(path, "tmp")
    UNFINISHED.add(temporary)
    return temporary


def commit(temporary: Path, path: Path, *, keep: bool = False) -> None:
    """Flush the file or folder, rename it to `path`, and flush the directory entry; keep: as of `write_atomic`."""
    for part in [temporary, *temporary.rglob("*")]:
        _sync(part)
    if keep:
        _put(temporary, path)
    else:
        _replace(path, temporary)
    UNFINISHED.discard(temporary)
    _sync(path.parent)


def remove_unfinished() -> None:
    """Remove the temporaries of this process: for a signal handler that ends it without unwinding."""
    for temporary in list(UNFINISHED):
        _remove(temporary)


def _put(temporary: Path, path: Path) -> None:
    """Rename the temporary folder to `path`, unless there is one that has something in it."""
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _remove(temporary)


def _replace(path: Path, temporary: Path) -> None:
    """Rename the temporary to `path`; an old folder steps aside first, and comes back if the second rename fails."""
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
    """Temporary name beside `path`, of kind "tmp" (being written) or "old" (being replaced)."""
    return path.with_name(f"{_prefix(path, kind)}{os.getpid()}")


def _prefix(path: Path, kind: str) -> str:
    """Beginning of such names on this host; the process id follows."""
    return f".{path.name}.{kind}-{socket.gethostname()}-"


def _remove_leftovers(path: Path) -> None:
    """Undo what killed writers of `path` left: rename an old folder back if there is no new one, remove the rest.

    Only leftovers of this host whose process has ended are touched: on a shared file system others may be
    writing.
    """
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
    """True if another process has this id. Our own id counts as ended: a leftover with it is of an earlier
    process.
    """
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
    """Remove a file or folder; errors are ignored, because the next write meets and reports them."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
