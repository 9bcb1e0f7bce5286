"""References: the names by which a user calls a trained model, resolved to a path.

A reference is "auto" (the newest run), a path of a run folder, .ckpt, Hugging Face or adapter folder, the name of a run below
the working folder, RUN/best or RUN/last for one of its checkpoints, an address of object storage, or a hub id. A mistake is
answered with the nearest name that exists; a path is never sent to the hub.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from genai_pl.atomic_io import ADAPTER, RESULTS, SWEEP, is_checkpoint, is_gguf
from genai_pl.errors import CheckpointError
from genai_pl.object_storage import is_remote

ROOTS = ("outputs", "multirun")  # Hydra's folders of runs and sweeps
# usual names of local folders, which are therefore never taken for accounts of the hub
LOCAL = {*ROOTS, "runs", "run", "models", "checkpoints", "ckpts", "exports", "results", "experiments", "data"}
OF_RUN = ("checkpoints/last.ckpt", "model/config.json", f"adapter/{ADAPTER}")
GGUF_MODEL = "model.gguf"  # of a folder that export.py format=gguf wrote
CHECKPOINTS = ("best", "last")  # of a run, named RUN/best and RUN/last
DEEPEST, MOST_FOLDERS = 6, 20_000  # levels and folders that a search for runs visits at most
SKIPPED = {"pyvenv.cfg"}  # files that mark folders without runs: virtual environments
DEPTH, MANY = 4, 2000  # levels and folders that a search for models visits at most


def resolve(reference: str, *, option: str = "checkpoint") -> Path:
    """The .ckpt, GGUF file, Hugging Face or adapter folder that a reference stands for, downloaded if it is a hub id.

    option: name of the option that held it, for the CheckpointError.
    """
    if reference == "auto":
        newest = newest_run(Path())
        if newest is None:
            raise CheckpointError(f"{option}=auto: no run below this folder; train one first")
        return _model_of_run(newest, option)
    if is_remote(reference):
        return _from_storage(reference, option)
    path = Path(reference).expanduser()
    # what exists at the path wins over names of runs, and both over the hub
    if is_checkpoint(path) or is_gguf(path) or (path / "config.json").is_file() or (path / ADAPTER).is_file():
        return path
    if (path / GGUF_MODEL).is_file():
        return path / GGUF_MODEL
    if path.is_dir():
        return _model_of_run(path, option)
    if path.name.removesuffix(".ckpt") in CHECKPOINTS and (run := run_of(str(path.parent), option)):
        return _checkpoint_of_run(run, path.name.removesuffix(".ckpt"), option)
    if folder := named_run(reference, option) or named_sweep(reference, option):
        return _model_of_run(folder, option)
    if not is_hub_id(reference):
        raise CheckpointError(
            f"{option}={reference}: no such run folder, .ckpt file or Hugging Face folder{nearest(reference)}"
        )
    return _from_hub(reference, option)


def _from_storage(address: str, option: str) -> Path:
    """The downloaded model of an address in object storage, or checkpoint of the run whose copy is there."""
    from genai_pl.remote_models import fetch_checkpoint, fetch_model

    run, _, which = address.rstrip("/").rpartition("/")
    return fetch_checkpoint(run, which, option) if which in CHECKPOINTS else fetch_model(address, option)


def is_hub_id(reference: str) -> bool:
    """True if a reference has the form account/model and its first part is no local folder of models."""
    account, _, name = reference.partition("/")
    if not account or not name or "/" in name or account.startswith((".", "~")) or name.endswith(".ckpt"):
        return False
    return account not in LOCAL and not any(is_run(child) for child in _folders(Path(account)))


def folder_of(name: str) -> Path:
    """The folder of a model that was loaded before: the path itself, or the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else Path(name)


def resolve_adapter(reference: str, *, option: str = "adapter") -> Path:
    """The adapter folder that a reference stands for: itself, or `adapter/` of a run; CheckpointError names the option."""
    if is_remote(reference):
        from genai_pl.remote_models import fetch_model

        folder = fetch_model(reference, option, adapter=True)
        if not (folder / ADAPTER).is_file():
            raise CheckpointError(f"{option}={reference}: no {ADAPTER} there, nor in its adapter/")
        return folder
    here = Path(reference).exists()
    named = None if here else named_run(reference, option) or named_sweep(reference, option)
    for path in (Path(reference).expanduser(), Path(reference) / "adapter", *([named / "adapter"] if named else [])):
        if (path / ADAPTER).is_file():
            return path
    refuse_sweep(named or Path(reference), option)
    raise CheckpointError(f"{option}={reference}: no {ADAPTER} in this folder, nor in its adapter/")


def newest_run(root: Path, *, resumable: bool = False) -> Path | None:
    """The run below a folder whose newest checkpoint is the newest, by the time inside the checkpoint; None if there is none.

    File times do not count: copying a run folder would change them.
    resumable: only runs with a checkpoint, outside of sweeps.
    """
    saved_at = {
        run: saved for run in find_runs(root, jobs=not resumable) if (saved := saved_last(run, exports=not resumable))
    }
    return max(saved_at, key=saved_at.__getitem__) if saved_at else None


def find_runs(root: Path, *, jobs: bool) -> Iterator[Path]:
    """Yields the run folders below a folder. jobs: whether jobs of sweeps count."""
    return _search(root, is_run, SKIPPED if jobs else SKIPPED | {SWEEP})


def find_sweeps(root: Path) -> Iterator[Path]:
    """Yields the sweep folders below a folder."""
    return _search(root, is_sweep, SKIPPED)


def _search(root: Path, matches: Callable[[Path], bool], stop_files: set[str]) -> Iterator[Path]:
    """Yields the folders that match. The search does not enter matches, hidden folders, or folders with one of `stop_files`."""
    for folder, names, files in islice(os.walk(root), MOST_FOLDERS):
        path = Path(folder)
        is_match = matches(path)
        if is_match:
            yield path
        skipped = is_match or len(path.relative_to(root).parts) >= DEEPEST or not stop_files.isdisjoint(files)
        names[:] = [] if skipped else sorted(name for name in names if not name.startswith((".", "__")))


def saved_last(run: Path, *, exports: bool = True) -> tuple[float, int] | None:
    """(time, step) of the newest checkpoint of a run, as stored in it; (time, 0) of its export if it has none, or None.

    exports: whether an export counts.
    """
    from genai_pl.callbacks import newest_checkpoints, saved_at

    if newest := newest_checkpoints(run / "checkpoints"):
        return max(saved_at(checkpoint) for checkpoint in newest[:2])
    times = [(run / name).stat().st_mtime for name in OF_RUN[1:] if (run / name).exists()] if exports else []
    return (max(times), 0) if times else None


def named_run(name: str, option: str) -> Path | None:
    """The run below the working folder whose folder has this name, or None; CheckpointError if several have."""
    return _named(name, option, "runs", lambda: find_runs(Path(), jobs=False))


def named_sweep(name: str, option: str) -> Path | None:
    """The sweep below the working folder whose folder has this name, or None; CheckpointError if several have."""
    return _named(name, option, "sweeps", lambda: find_sweeps(Path()))


def _named(name: str, option: str, kind: str, search: Callable[[], Iterable[Path]]) -> Path | None:
    if not name or "/" in name or name.startswith((".", "~")):
        return None
    folders = [folder for folder in search() if folder.name == name]
    if len(folders) > 1:
        raise CheckpointError(
            f"{option}={name}: {len(folders)} {kind} are called so; give the path of one: {_join_paths(folders)}"
        )
    return folders[0] if folders else None


def _join_paths(paths: list[Path]) -> str:
    """The first five paths, for an error message."""
    return ", ".join(map(str, paths[:5])) + (", ..." if len(paths) > 5 else "")


def is_run(folder: Path) -> bool:
    """True for a run folder: it has checkpoints, or Hydra's settings and an export."""
    return any((folder / "checkpoints").glob("*.ckpt")) or (
        (folder / ".hydra").is_dir() and any((folder / name).exists() for name in OF_RUN)
    )


def is_sweep(folder: Path) -> bool:
    """True for the folder of a sweep, whose jobs are runs."""
    return (folder / SWEEP).is_file()


def refuse_sweep(folder: Path, option: str) -> None:
    """CheckpointError for a sweep folder, which is not one model; the message lists its jobs."""
    if not is_sweep(folder):
        return
    jobs = sorted(find_runs(folder, jobs=True), key=lambda job: (len(job.name), job.name))
    here = (
        f"give one of its jobs: {_join_paths(jobs)} (python compare.py {folder} ranks them)"
        if jobs
        else "without a job yet"
    )
    raise CheckpointError(f"{option}={folder}: a sweep; {here}")


def _model_of_run(folder: Path, option: str) -> Path:
    """The exported adapter or model of a run, or its last checkpoint if the run went on after the export."""
    refuse_sweep(folder, option)
    last = folder / "checkpoints" / "last.ckpt"
    for exported in (folder / "adapter" / ADAPTER, folder / "model" / "config.json"):
        if exported.exists() and not (last.exists() and _has_newer_checkpoint(folder, last, exported)):
            return exported.parent
    if last.exists():
        return last
    inside = [str(path) for path in (*_models(folder), *sorted(folder.glob("*.gguf")))]
    hint = f"; in it is {inside[0]}" if inside else ""
    raise CheckpointError(
        f"{option}={folder}: neither model/config.json nor checkpoints/last.ckpt in this folder{hint}"
    )


def run_of(reference: str, option: str) -> Path | None:
    """The folder of a run by `auto`, its path or its name; None if there is none."""
    if reference == "auto":
        return newest_run(Path(), resumable=True)
    return Path(reference) if is_run(Path(reference)) else named_run(reference, option)


def _checkpoint_of_run(run: Path, name: str, option: str) -> Path:
    """The best or last checkpoint of a run; CheckpointError if it has none."""
    path = run / "checkpoints" / f"{name}.ckpt"
    if not is_checkpoint(path):
        how = ": set callbacks.checkpoint.best=val/loss when training" if name == "best" else ""
        raise CheckpointError(f"{option}={run / name}: the run has no {path.relative_to(run)}{how}")
    return path


def _has_newer_checkpoint(run: Path, last: Path, exported: Path) -> bool:
    """True if the last checkpoint is of a later step than the export.

    The exported step is in results.json. Without one, the export was made by hand; file times over a minute apart decide then.
    """
    from genai_pl.callbacks import step_of

    try:
        reached = json.loads((run / RESULTS).read_text(encoding="utf-8"))["step"]
        return step_of(last) > reached
    except (OSError, ValueError, TypeError, KeyError, CheckpointError):
        return last.stat().st_mtime > exported.stat().st_mtime + 60


def _from_hub(name: str, option: str) -> Path:
    """The snapshot folder of a hub id, without pickled weights and code; CheckpointError if it cannot be downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{option}={name}: not here{nearest(name)}, and not from the hub ({reason})") from None


def nearest(reference: str) -> str:
    """ " (the nearest here: PATH)" for an error message, with the local model or sweep whose path is most similar, or ""."""
    path = Path(reference).expanduser()
    above = next((folder for folder in path.parents if folder.is_dir()), Path())
    # models beside the mistyped path, and below the usual roots
    candidates = [str(model) for root in dict.fromkeys((above, *map(Path, ROOTS))) for model in _models(root)]
    candidates += [str(sweep) for root in map(Path, ROOTS) for sweep in find_sweeps(root)]
    # a path into a run folder means the run; a name alone is compared with names
    near = [str(above)] if is_run(above) else get_close_matches(str(path), candidates, n=1, cutoff=0.6)
    if not near and "/" not in reference:  # a name alone, mistyped
        by_name = {Path(model).name: model for model in candidates}
        near = [by_name[name] for name in get_close_matches(reference, by_name, n=1, cutoff=0.6)]
    return f" (the nearest here: {near[0]})" if near else ""


def _models(root: Path) -> Iterator[Path]:
    """Yields run folders, Hugging Face folders and checkpoints at most DEPTH levels below `root`, level by level."""
    level, seen = [root] if root.is_dir() else [], 0
    for _ in range(DEPTH):
        below = [child for folder in level for child in _folders(folder)]
        seen += len(below)
        level = [child for child in below if not (is_run(child) or _is_folder(child))]
        yield from (child for child in below if is_run(child) or _is_folder(child))
        if seen > MANY:
            return


def _folders(folder: Path) -> list[Path]:
    """The subfolders of a folder, without hidden ones; empty if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []


def _is_folder(folder: Path) -> bool:
    """True for a Hugging Face or adapter folder."""
    return (folder / "config.json").is_file() or (folder / ADAPTER).is_file()
