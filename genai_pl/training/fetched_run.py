"""Fetched run: a run folder made anew from its copy in object storage, so that a run goes on where its machine was lost.

`resume=s3://BUCKET/RUN` names the copy that `callbacks.checkpoint.dirpath` keeps. Before the saved command line is read, what a
resume needs is downloaded into a run folder: settings, log, metrics, the newest checkpoint that can be read whole, and the
best one. From there on it is a resume of that folder, and the copy goes on too. What the folder holds already is not fetched.
`resume=auto callbacks.checkpoint.dirpath=s3://BUCKET/RUN` does the same if there is something, and begins a run otherwise:
one command for every start of a machine.
"""

import re
import sys
from pathlib import Path, PurePosixPath

from genai_pl.atomic_io import CONTENTS, write_atomic
from genai_pl.callbacks.checkpoint_files import link, named_step, newest_checkpoints, remove_checkpoint_files, step_of
from genai_pl.callbacks.mirror import BEST, COPIED_TO, OPTION, copied_to
from genai_pl.checkpoints.file import check_resumable, read_contents
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.object_storage import below, download, is_remote, one_at_a_time
from genai_pl.training.trust import key_of, value_of

STEP = re.compile(r"step=\d+\.ckpt")
LEFT_OUT = ("checkpoints", "model", "adapter")  # folders of which a resume needs nothing, or what is chosen by name


def with_fetched_run(reference: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The value of `resume=` and the command line, with a folder in place of an address of object storage.

    The words may gain the folder of the run, `hydra.run.dir=outputs/NAME`, and the address of its copy. ConfigError beside
    -m, CheckpointError for an address without a run.
    """
    typed = {key_of(a): value_of(a) for a in arguments}
    address = reference if is_remote(reference) else typed.get(OPTION) if reference == "auto" else None
    if not is_remote(address) or "${" in address:
        return reference, arguments
    if {"-m", "--multirun"} & set(arguments):
        if reference == "auto":  # each job has an address of its own
            return reference, arguments
        raise ConfigError(f"resume={reference}: a copy is of one run; a sweep goes on from its folder, by its path")
    if typed.get(OPTION, address).rstrip("/") != address.rstrip("/"):
        raise ConfigError(f"resume={reference} and {OPTION}={typed[OPTION]}: two copies of a run; leave one out")
    # where the run is on this machine
    address = address.rstrip("/")
    name = re.sub(r"[^\w.=-]+", "-", PurePosixPath(address.partition("://")[2]).name) or "run"
    folder = Path(typed.get("hydra.run.dir", f"outputs/{name}"))
    found = fetch_run(address, folder)
    if not found and reference != "auto":
        raise CheckpointError(f"resume={reference}: no checkpoint in {address}/checkpoints")
    words = [f"resume={folder}" if found else "resume=auto", f"hydra.run.dir={folder}", f"{OPTION}={address}"]
    added = [word for word in words if key_of(word) not in typed or key_of(word) == "resume"]
    at = next(n for n, a in enumerate(arguments) if key_of(a) == "resume")
    return value_of(words[0]), [*arguments[:at], *added, *arguments[at + 1 :]]


def fetch_run(address: str, folder: Path) -> bool:
    """Whether there is a run at the address, after which the folder holds it; each process of a machine may call this.

    ConfigError for a folder of another run.
    """
    there = below(address, "resume")
    checkpoints = sorted(_checkpoints(there), key=lambda name: named_step(Path(name)), reverse=True)
    if not checkpoints:
        return False
    with one_at_a_time(folder):
        here = newest_checkpoints(folder / "checkpoints")
        if here and copied_to(folder) != address:
            raise ConfigError(f"{folder}: holds another run than {address}; give output_dir= another folder")
        if here and step_of(here[0]) >= named_step(Path(checkpoints[0])):
            return True
        # what is small, then the newest checkpoint that is whole, then the best
        print(f"fetching    {address} to {folder}", flush=True)
        small = [name for name in there if PurePosixPath(name).parts[0] not in LEFT_OUT and not _is_hidden(name)]
        for name in small:
            write_atomic(folder / name, lambda path, name=name: _download(address, name, path))
        newest = _first_whole(address, checkpoints, there, folder)
        if BEST in there:
            _download(address, BEST, folder / BEST)
            best = (folder / BEST).read_text(encoding="utf-8").strip()
            (folder / BEST).unlink()
            if best in checkpoints and not (folder / "checkpoints" / best).exists():
                _fetch_checkpoint(address, best, there, folder)
        link(newest, folder / "checkpoints" / "last.ckpt")
        write_atomic(folder / COPIED_TO, lambda path: path.write_text(address, encoding="utf-8"))
    return True


def _is_hidden(name: str) -> bool:
    """Whether a path has a hidden part, other than the settings."""
    return any(part.startswith(".") and part != ".hydra" for part in PurePosixPath(name).parts)


def _checkpoints(there: dict[str, dict]) -> set[str]:
    """Names of the complete checkpoints among the files of a copy: single files, and folders with their index."""
    paths = [PurePosixPath(name).parts for name in there]
    names = {p[1] for p in paths if p[0] == "checkpoints" and (len(p) == 2 or p[2:] == (CONTENTS,))}
    return {name for name in names if STEP.fullmatch(name)}


def _first_whole(address: str, names: list[str], there: dict[str, dict], folder: Path) -> Path:
    """The first checkpoint that training can go on from, downloaded; CheckpointError if there is none."""
    for name in names:
        path = _fetch_checkpoint(address, name, there, folder)
        try:
            check_resumable(path, read_contents(path))
            return path
        except CheckpointError as error:
            print(f"{error}; taking the one before it", file=sys.stderr, flush=True)
            remove_checkpoint_files(path)
    raise CheckpointError(f"resume={address}: none of its checkpoints can be read")


def _fetch_checkpoint(address: str, name: str, there: dict[str, dict], folder: Path) -> Path:
    """One checkpoint, downloaded under its name when it is complete."""
    path, prefix = folder / "checkpoints" / name, f"checkpoints/{name}"
    parts = [n.removeprefix(f"{prefix}/") for n in there if n.startswith(f"{prefix}/")]

    def fill(temporary: Path) -> None:
        for part in parts:
            _download(address, f"{prefix}/{part}", temporary / part)
        if not parts:
            _download(address, prefix, temporary)

    write_atomic(path, fill)
    return path


def _download(address: str, name: str, path: Path) -> None:
    """Write a file below the address to a path."""
    download(f"{address}/{name}", path, "resume", kind=CheckpointError)
