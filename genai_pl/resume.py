"""Taking up a run again: which run, with which settings, from which checkpoint."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from genai_pl.errors import CheckpointError
from genai_pl.files import is_checkpoint
from genai_pl.masking import refuse_secrets
from genai_pl.sweeps import replay_sweep
from genai_pl.trust import check_links, key_of, plain, read_overrides

ROOTS = ("outputs",)
OVERRIDES = Path(".hydra", "overrides.yaml")


def replay(arguments: list[str]) -> list[str]:
    """The command line that continues the run which `resume=` names: its own overrides first, then the new ones.

    Without `resume=` the arguments come back as they are; a sweep goes on with `resume=auto`.
    """
    refuse_secrets(arguments)
    reference = next((a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")), "null")
    if reference in ("null", "None", ""):
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        return replay_sweep(arguments) if reference == "auto" else arguments
    run = _run_folder(reference, arguments)
    if run is None:
        if reference == "auto":
            print("resume=auto: no run to continue, starting a new one", flush=True)
            return [a for a in arguments if not a.startswith("resume=")]
        return arguments
    check_links(run)
    saved = _saved_overrides(run)
    given = {key_of(a) for a in arguments}
    kept = plain(saved, run / OVERRIDES, arguments)
    if "strategy" in given:  # another one has not the options of the old
        kept = [o for o in kept if not key_of(o).startswith("strategy.")]
    if "hydra.run.dir" not in given:
        kept.append(f"hydra.run.dir='{run}'")
    flags = next((n for n, a in enumerate(arguments) if "=" in a and not a.startswith("-")), len(arguments))
    return arguments[:flags] + kept + arguments[flags:]  # --config-dir FOLDER must not stand between overrides


def _run_folder(reference: str, arguments: list[str]) -> Path | None:
    if reference == "auto":
        chosen = next((a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("hydra.run.dir=")), None)
        found = [p for root in ([chosen] if chosen else ROOTS) for p in _checkpoints(Path(root).rglob)]
        return max(found, key=lambda p: p.stat().st_mtime_ns).parent.parent if found else None
    path = Path(reference)
    if path.is_dir() and not is_checkpoint(path):
        if not _checkpoints(path.glob):
            raise CheckpointError(f"resume={reference}: no checkpoint in {path / 'checkpoints'}")
        return path
    if not is_checkpoint(path):
        raise CheckpointError(f"resume={reference}: no such run folder or .ckpt file")
    run = path.parent.parent
    return run if (run / OVERRIDES).exists() else None


def _checkpoints(search: Callable[[str], Iterable[Path]]) -> list[Path]:
    return [path for path in search("checkpoints/*.ckpt") if is_checkpoint(path)]


def _saved_overrides(run: Path) -> list[str]:
    path = run / OVERRIDES
    return read_overrides(path) if os.path.lexists(path) else []


def choose_checkpoint(reference: str, run: Path) -> Path:
    """The checkpoint to go on from: the newest valid one for `auto`; otherwise the one named, or an error that offers another."""
    from genai_pl.callbacks import newest_checkpoints
    from genai_pl.models.checkpoint import check_resumable, read_contents

    path = Path(reference)
    named = is_checkpoint(path)
    folder = run / "checkpoints" if reference == "auto" else path.parent if named else path / "checkpoints"
    candidates = newest_checkpoints(folder)
    if named:
        candidates = [path, *(c for c in candidates if not c.samefile(path))]
    broken: CheckpointError | None = None
    for candidate in candidates:
        try:
            check_resumable(candidate, read_contents(candidate))
        except CheckpointError as error:
            if reference == "auto":
                print(f"{error}; taking the one before it", file=sys.stderr, flush=True)
            broken = broken or error
            continue
        if broken is None or reference == "auto":
            return candidate
        raise CheckpointError(f"{broken}; the newest valid one is resume={candidate}")
    raise broken or CheckpointError(f"resume={reference}: no checkpoint in {folder}")


def describe_resume(checkpoint: Path) -> str:
    """One line on where the run goes on and what comes back."""
    from genai_pl.models.checkpoint import read_contents

    contents = read_contents(checkpoint)
    return (
        f"resuming    {checkpoint}: step {contents['global_step']}, epoch {contents['epoch']}; "
        "weights, optimizer, schedule, random numbers and data position restored"
    )
