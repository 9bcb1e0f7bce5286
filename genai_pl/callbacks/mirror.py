"""Mirror: a copy of the run folder in object storage, from which another machine goes on when this one is lost.

The copy has the layout of the folder. A checkpoint is copied by a thread while training goes on, and what is small (settings,
log, metrics) with it; the next checkpoint waits for it, as the end of the run does, so what is being copied is never removed.
A sharded checkpoint gets the file that makes it one last. An object appears when it is complete, so a machine that is lost in
the middle of a copy leaves the copy before it. The address is listed once, when a run begins or goes on: after that only this
run writes there, and a listing of many objects takes seconds.

`checkpoints/best.txt` names the best checkpoint, because object storage has no links; `last.ckpt` is the one of the highest step.
"""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from genai_pl.atomic_io import CONTENTS, write_atomic
from genai_pl.callbacks.checkpoint_files import named_step
from genai_pl.errors import ConfigError, TrainingError
from genai_pl.object_storage import below, open_storage, reason

log = logging.getLogger(__name__)

OPTION = "callbacks.checkpoint.dirpath"
COPIED_TO = ".copied_to"  # in a run folder: the address of its copy
BEST = "checkpoints/best.txt"


class Mirror:
    """Copies a run folder to an address.

    folder: of the run. address: of its copy, which is a folder. best: name of the checkpoint that `best.ckpt` is, if there
    is one.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address.rstrip("/")
        self.best: str | None = None
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of what has been copied
        self._there: set[str] = set()  # checkpoint files at the address, or being copied there
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """ConfigError where the address cannot be opened, or holds another run than that of the folder."""
        there = below(self.address, OPTION)
        if any(name.startswith("checkpoints/") for name in there) and copied_to(self.folder) != self.address:
            raise ConfigError(
                f"{OPTION}={self.address}: holds a run already; continue it with resume={self.address}, or name another"
            )

    def begin(self) -> None:
        """Copy the settings of a run that begins, and start with the rest; TrainingError where the storage refuses them."""
        write_atomic(self.folder / COPIED_TO, lambda path: path.write_text(self.address, encoding="utf-8"))
        small, checkpoints = _contents(self.folder)
        try:
            self._send(small)
            # a run that goes on finds its checkpoints there
            there = below(self.address, OPTION)
            self._there = {name for name in there if name.startswith("checkpoints/step=")}
            found = [p for p in checkpoints if there.get(self._name(p), {}).get("size") == p.stat().st_size]
            self._sent |= {self._name(path): _state(path) for path in found}
        except Exception as error:  # every storage has errors of its own
            raise TrainingError(f"{OPTION}={self.address}: cannot be written, {reason(error)}") from error
        self.start()

    def start(self) -> None:
        """Copy what is new in a thread; a failure is one line, because the next checkpoint copies again."""
        self.wait()
        self._thread = threading.Thread(target=self._copy_and_tell, name="mirror", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no copy is being made."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Copy what is new since, and return when all is there; TrainingError where it is not."""
        self.wait()
        try:
            self._copy()
        except Exception as error:  # every storage has errors of its own
            raise TrainingError(
                f"{OPTION}={self.address}: the end of the run is not there, but in {self.folder}: {reason(error)}"
            ) from error

    def _copy_and_tell(self) -> None:
        try:
            self._copy()
        except Exception as error:  # every storage has errors of its own
            log.warning("copy        %s: %s; the next checkpoint tries again", self.address, reason(error))

    def _copy(self) -> None:
        """Copy what has changed, then remove the checkpoints that the folder no longer has."""
        system, root = open_storage(self.address, OPTION)
        small, checkpoints = _contents(self.folder)
        self._send([*small, *checkpoints])
        if self.best:
            system.pipe_file(f"{root}/{BEST}", self.best.encode())
        # of a folder first the file that makes it a checkpoint
        kept = {self._name(path) for path in checkpoints}
        for name in sorted(self._there - kept, key=lambda name: not name.endswith(CONTENTS)):
            with suppress(FileNotFoundError):  # its copy had failed, or somebody has removed it
                system.rm_file(f"{root}/{name}")
            self._there.discard(name)
            self._sent.pop(name, None)

    def _send(self, paths: Sequence[Path]) -> None:
        """Copy the files that have changed since they were copied; one that was removed meanwhile is left out."""
        system, root = open_storage(self.address, OPTION)
        for path in paths:
            try:
                state = _state(path)
                if self._sent.get(self._name(path)) != state:
                    if path.is_relative_to(self.folder / "checkpoints"):
                        self._there.add(self._name(path))
                    system.put_file(str(path), f"{root}/{self._name(path)}")
                    self._sent[self._name(path)] = state
            except FileNotFoundError:
                if path.exists():
                    raise

    def _name(self, path: Path) -> str:
        """The path of a file in the run folder."""
        return path.relative_to(self.folder).as_posix()


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def copied_to(folder: Path) -> str | None:
    """The address of a run folder's copy; None where it has none."""
    path = folder / COPIED_TO
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of a run folder to copy: those outside of its checkpoints, and those of checkpoints, a folder's index last."""
    small, checkpoints = [], []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") and part != ".hydra" for part in parts)  # the lock, and what is being written
        if hidden or path.is_symlink() or not path.is_file():
            continue
        if parts[0] != "checkpoints":
            small.append(path)
        elif parts[1].startswith("step=") and not (folder / "checkpoints" / parts[1]).is_symlink():
            checkpoints.append(path)
    checkpoints.sort(key=lambda path: (-named_step(Path(path.relative_to(folder).parts[1])), path.name == CONTENTS))
    return small, checkpoints
