"""Taking up a run again: which run, with which settings, from which checkpoint."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from genai_pl.atomic_io import is_checkpoint
from genai_pl.config.redaction import redact, refuse_secrets
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.training.output_folders import is_first_process
from genai_pl.training.sweeps import replay_sweep
from genai_pl.training.trust import PER_COMMAND, check_links, key_of, read_overrides, trusted_overrides

TYPED_ARGUMENTS: list[str] = []  # the command line before it was completed: what a person asked for now
OVERRIDES = Path(".hydra", "overrides.yaml")


def replay(arguments: list[str]) -> list[str]:
    """The command line that continues the run which `resume=` names: its own overrides first, then the new ones.

    Without `resume=` the arguments come back as they are; with -m it is a sweep that goes on, the newest or the one named.
    """
    refuse_secrets(arguments)
    TYPED_ARGUMENTS[:] = arguments
    arguments = _with_hydra_folder(arguments)
    reference = next((a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")), "null")
    if reference in ("null", "None", ""):
        _check_folder_unused(arguments)
        return arguments
    if {"-m", "--multirun"} & set(arguments):
        arguments = _resume_sweep(reference, arguments)
        return replay_sweep(arguments) if "resume=auto" in arguments else arguments
    if (named_folder := _named_run_folder(reference)) is not None:
        reference, arguments = (
            named_folder,
            [f"resume='{named_folder}'" if key_of(a) == "resume" else a for a in arguments],
        )
    run = _find_run(reference, arguments)
    if run is None:
        if reference == "auto":
            _check_folder_unused(arguments)
            print("resume=auto: no run to continue, starting a new one", flush=True)
            return [a for a in arguments if not a.startswith("resume=")]
        return arguments
    check_links(run)
    saved = _saved_overrides(run)
    keys = {key_of(a) for a in arguments}
    _check_init_from(saved, arguments)
    trusted = trusted_overrides(saved, run / OVERRIDES, arguments)
    _print_changes(saved, arguments)
    if "strategy" in keys:  # another one has not the options of the old
        trusted = [o for o in trusted if not key_of(o).startswith("strategy.")]
    if "hydra.run.dir" not in keys:
        trusted.append(f"hydra.run.dir={run}")  # what it takes to be read as it is, whoever reads the command line adds
    n_flags = next((n for n, a in enumerate(arguments) if "=" in a and not a.startswith("-")), len(arguments))
    return arguments[:n_flags] + trusted + arguments[n_flags:]  # --config-dir FOLDER must not stand between overrides


def _with_hydra_folder(arguments: list[str]) -> list[str]:
    """The command line with `output_dir=` as what it means to Hydra: the folder of the run, or of the sweep."""
    kind = "hydra.sweep.dir" if {"-m", "--multirun"} & set(arguments) else "hydra.run.dir"
    by_key = {key_of(a): a for a in arguments}
    if "output_dir" not in by_key:
        return arguments
    if kind in by_key:
        raise ConfigError(f"output_dir and {kind} name the same folder: give one of them")
    return [f"{kind}={a.partition('=')[2]}" if key_of(a) == "output_dir" else a for a in arguments]


def _chosen_folder(arguments: list[str]) -> str | None:
    return next((_value(a) for a in arguments if key_of(a) == "hydra.run.dir"), None)


def _check_folder_unused(arguments: list[str]) -> None:
    """ConfigError for a new run in the folder of an old one: their files would mix."""
    chosen = _chosen_folder(arguments)
    if chosen and {"-m", "--multirun"}.isdisjoint(arguments) and _checkpoints(Path(chosen).glob):
        raise ConfigError(f"{chosen}: holds a run already; continue it with resume={chosen}, or name another folder")


def _check_init_from(saved: list[str], arguments: list[str]) -> None:
    """ConfigError for weights to start from beside those to go on with, unless what a run started from lies elsewhere now."""
    from genai_pl.references import is_hub_id, named_run

    old_value = next((_value(o) for o in reversed(saved) if key_of(o) == "init_from"), "null")
    argument = next((a for a in arguments if key_of(a) == "init_from" and _value(a) != old_value), None)
    if argument is None or (
        os.path.exists(old_value) and os.path.realpath(old_value) == os.path.realpath(_value(argument))
    ):
        return
    still_there = (
        os.path.exists(old_value)
        or old_value in ("null", "auto")
        or is_hub_id(old_value)
        or named_run(old_value, "init_from")
    )
    if still_there:
        raise ConfigError(
            f"{argument}: has no effect beside resume=, which goes on with the run's own weights; leave one out"
        )


def _print_changes(saved: list[str], arguments: list[str]) -> None:
    """One line for each option that is typed and was another, or was not given."""
    if not is_first_process():
        return  # which says it
    saved_by_key = {key_of(o): o for o in saved}
    for argument in arguments:
        key = key_of(argument)
        if "=" in argument and key not in PER_COMMAND and saved_by_key.get(key) != argument:
            old = f"was {_value(saved_by_key[key])}" if key in saved_by_key else "was not given"
            print(f"changed     {redact(argument)} ({redact(old)})", flush=True)


def _value(argument: str) -> str:
    return argument.partition("=")[2].strip("'\"")


def _named_run_folder(reference: str) -> str | None:
    """The path of the run that a name stands for; None for what is no name of a run."""
    from genai_pl.references import named_run

    run = None if reference == "auto" or Path(reference).exists() else named_run(reference, "resume")
    return None if run is None else str(run)


def _resume_sweep(reference: str, arguments: list[str]) -> list[str]:
    """The command line with the sweep that `resume=` names as resume=auto and its folder; jobs may all go on from one run."""
    from genai_pl.references import is_sweep, named_sweep, nearest

    if reference == "auto":
        return [a if key_of(a) != "resume" else "resume=auto" for a in arguments]
    if "," in reference:  # values that are swept
        return arguments
    path = Path(reference)
    sweep = path if path.exists() else named_sweep(reference, "resume")
    if sweep is not None and is_sweep(sweep):
        if "hydra.sweep.dir" in map(key_of, arguments):
            raise ConfigError(f"resume={reference} and hydra.sweep.dir both name the sweep: give one of them")
        return [*("resume=auto" if key_of(a) == "resume" else a for a in arguments), f"hydra.sweep.dir='{sweep}'"]
    run = sweep or _named_run_folder(reference)
    if run is None:
        raise CheckpointError(f"resume={reference}: no such sweep, run folder or .ckpt file{nearest(reference)}")
    return [f"resume='{run}'" if key_of(a) == "resume" else a for a in arguments]


def _find_run(reference: str, arguments: list[str]) -> Path | None:
    from genai_pl.references import is_sweep, named_sweep, nearest, newest_run

    if reference == "auto":
        return newest_run(Path(_chosen_folder(arguments) or "."), resumable=True)
    path = Path(reference)
    sweep = path if path.exists() else named_sweep(reference, "resume")
    if sweep is not None and is_sweep(sweep):
        resume_argument = shlex.quote(f"resume={sweep}")
        raise CheckpointError(
            f"resume={reference}: {sweep} is a sweep; it goes on by: python train.py -m {resume_argument}"
        )
    if path.is_dir() and not is_checkpoint(path):
        if not _checkpoints(path.glob):
            raise CheckpointError(f"resume={reference}: no checkpoint in {path / 'checkpoints'}")
        return path
    if not is_checkpoint(path):
        raise CheckpointError(f"resume={reference}: no such run folder or .ckpt file{nearest(reference)}")
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
    from genai_pl.checkpoints.file import check_resumable, read_contents

    path = Path(reference)
    is_named = is_checkpoint(path)
    folder = run / "checkpoints" if reference == "auto" else path.parent if is_named else path / "checkpoints"
    candidates = newest_checkpoints(folder)
    if is_named:
        candidates = [path, *(c for c in candidates if not c.samefile(path))]
    first_error: CheckpointError | None = None
    for candidate in candidates:
        try:
            check_resumable(candidate, read_contents(candidate))
        except CheckpointError as error:
            if reference == "auto":
                print(f"{error}; taking the one before it", file=sys.stderr, flush=True)
            first_error = first_error or error
            continue
        if first_error is None or reference == "auto":
            return candidate
        raise CheckpointError(f"{first_error}; the newest valid one is resume={candidate}")
    raise first_error or CheckpointError(f"resume={reference}: no checkpoint in {folder}")


def describe_resume(checkpoint: Path) -> str:
    """One line on where the run goes on and what comes back."""
    from genai_pl.checkpoints.file import read_contents

    contents = read_contents(checkpoint)
    return (
        f"resuming    {checkpoint}: step {contents['global_step']}; "
        "weights, optimizer, schedule, random numbers and data position restored"
    )
