"""Resume: the command line, and then the checkpoint, with which an earlier run goes on.

`resume=RUN` is not a second configuration system. Before Hydra starts, `replay` puts the overrides that the run
saved in `.hydra/overrides.yaml` in front of the words typed now, so that Hydra composes the same configuration,
later words win, and a changed option shows as one `changed` line. `RUN` is `auto` (the newest run here), a run
folder, a .ckpt file, the name of a run, the address of a run's copy (`fetched_run`), or with `-m` a sweep
(`sweeps.replay_sweep`). The saved overrides pass through `trust`.

After composition `choose_checkpoint` takes the newest checkpoint that can be read whole: the last one may be cut by
the crash that made a resume necessary. `run_folder.check_settings_unchanged` then compares the settings that cannot
change in the middle of a run.
"""

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from genai_pl.atomic_io import is_checkpoint
from genai_pl.config.redaction import redact, refuse_secrets
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.object_storage import refuse_remote
from genai_pl.ranks import is_first_process
from genai_pl.training.default_optimizer import with_default_optimizer
from genai_pl.training.sweeps import replay_sweep
from genai_pl.training.trust import PER_COMMAND, check_links, key_of, read_overrides, trusted_overrides, value_of

TYPED_ARGUMENTS: list[str] = []  # the command line as typed, before `replay` completes it
OVERRIDES = Path(".hydra", "overrides.yaml")
FOLDERS = ("output_dir", "hydra.run.dir", "hydra.sweep.dir")  # options that name a folder of this machine


def replay(arguments: list[str]) -> list[str]:
    """The command line that resumes the run which `resume=` names: saved overrides first, the words typed now
    after them.

    Without `resume=` the arguments come back with `output_dir=` translated and the default optimizer of what they train;
    with -m the sweep of that name
    goes on instead of one run. Side effect: TYPED_ARGUMENTS holds the words as typed. Raises ConfigError or
    CheckpointError for an unknown run, a run without checkpoints, contradicting words (two output folders,
    `init_from` of other weights) and saved overrides that `trust` refuses; prints a `changed` line for each
    option that differs.
    """
    # a run folder keeps the command line: refuse passwords first
    refuse_secrets(arguments)
    TYPED_ARGUMENTS[:] = arguments
    for option, value in ((key_of(a), value_of(a)) for a in arguments):
        if option in FOLDERS:
            refuse_remote(value, option, instead="callbacks.checkpoint.dirpath= keeps a copy of the run there")
    arguments = _with_hydra_folder(arguments)
    reference = next((a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")), "null")
    if reference in ("null", "None", ""):
        _check_folder_unused(arguments)
        return with_default_optimizer(arguments)
    # a run whose copy is in object storage becomes a folder here; imported late, as it knows checkpoints
    from genai_pl.training.fetched_run import with_fetched_run

    reference, arguments = with_fetched_run(reference, arguments)
    # a sweep goes on as a whole, job by job
    if {"-m", "--multirun"} & set(arguments):
        arguments = _resume_sweep(reference, arguments)
        return replay_sweep(arguments) if "resume=auto" in arguments else arguments
    # a run by its name, or by its path
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
            return with_default_optimizer([a for a in arguments if not a.startswith("resume=")])
        return arguments
    # the saved command line, as far as it is trusted and not overruled
    check_links(run)
    saved = _saved_overrides(run)
    keys = {key_of(a) for a in arguments}
    _check_init_from(saved, arguments)
    trusted = trusted_overrides(saved, run / OVERRIDES, arguments)
    _print_changes(saved, arguments)
    if "strategy" in keys:  # options of the old strategy mean nothing to another
        trusted = [o for o in trusted if not key_of(o).startswith("strategy.")]
    if "hydra.run.dir" not in keys:
        trusted.append(f"hydra.run.dir={run}")  # `quote_argument` adds the quotes it needs
    # argparse takes positional words in one row only: no flag with a value may stand between overrides
    n_flags = next((n for n, a in enumerate(arguments) if "=" in a and not a.startswith("-")), len(arguments))
    return arguments[:n_flags] + trusted + arguments[n_flags:]


def _with_hydra_folder(arguments: list[str]) -> list[str]:
    """The arguments with `output_dir=` under the name that Hydra gives it: folder of a run, or with -m of a sweep."""
    kind = "hydra.sweep.dir" if {"-m", "--multirun"} & set(arguments) else "hydra.run.dir"
    by_key = {key_of(a): a for a in arguments}
    if "output_dir" not in by_key:
        return arguments
    if kind in by_key:
        raise ConfigError(f"output_dir and {kind} name the same folder: give one of them")
    return [f"{kind}={a.partition('=')[2]}" if key_of(a) == "output_dir" else a for a in arguments]


def _chosen_folder(arguments: list[str]) -> str | None:
    """The folder that the command line gives the run, without quotes; None where the configuration chooses it."""
    return next((value_of(a) for a in arguments if key_of(a) == "hydra.run.dir"), None)


def _check_folder_unused(arguments: list[str]) -> None:
    """ConfigError for a new run in the folder of an old one: their metrics and checkpoints would mix."""
    chosen = _chosen_folder(arguments)
    if chosen and {"-m", "--multirun"}.isdisjoint(arguments) and _checkpoints(Path(chosen).glob):
        raise ConfigError(f"{chosen}: holds a run already; continue it with resume={chosen}, or name another folder")


def _check_init_from(saved: list[str], arguments: list[str]) -> None:
    """ConfigError for an `init_from=` that differs from the run's own: a resume loads the run's weights over it.

    It is allowed where the old value is a path that no longer exists: a moved folder can be named anew. An
    adapter's base is loaded from there, because checkpoints of an adapter do not hold it.
    """
    from genai_pl.references import is_hub_id, named_run

    old_value = next((value_of(o) for o in reversed(saved) if key_of(o) == "init_from"), "null")
    argument = next((a for a in arguments if key_of(a) == "init_from" and value_of(a) != old_value), None)
    # the same weights under another path are no contradiction
    if argument is None or (
        os.path.exists(old_value) and os.path.realpath(old_value) == os.path.realpath(value_of(argument))
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
    """Print one `changed` line for each option that the run had not, or had with another value; on the first
    process only.
    """
    if not is_first_process():
        return  # the first process prints it
    saved_by_key = {key_of(o): o for o in saved}
    for argument in arguments:
        key = key_of(argument)
        old_value = value_of(saved_by_key[key]) if key in saved_by_key else None  # quotes are no part of it
        if "=" in argument and key not in PER_COMMAND and old_value != value_of(argument):
            old = "was not given" if old_value is None else f"was {old_value}"
            print(f"changed     {redact(argument)} ({redact(old)})", flush=True)


def _named_run_folder(reference: str) -> str | None:
    """Path of the run that a name stands for (`run_name=`, or the last part of a folder); None for anything else."""
    from genai_pl.references import named_run

    run = None if reference == "auto" or Path(reference).exists() else named_run(reference, "resume")
    return None if run is None else str(run)


def _resume_sweep(reference: str, arguments: list[str]) -> list[str]:
    """The arguments of `-m resume=SWEEP` as `resume=auto hydra.sweep.dir=SWEEP`.

    `resume=RUN` with -m is a new sweep whose jobs all start from that one run: it keeps its meaning, as does a
    comma-separated list of runs. CheckpointError for an unknown name.
    """
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
    """The folder of the run that `resume=` names; None for `auto` without runs, and for a lone .ckpt file without
    settings.

    CheckpointError for a folder without checkpoints, an unknown path, and a sweep without -m (with the command
    to type).
    """
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
    # a run folder, then a file
    if path.is_dir() and not is_checkpoint(path):
        if not _checkpoints(path.glob):
            raise CheckpointError(f"resume={reference}: no checkpoint in {path / 'checkpoints'}")
        return path
    if not is_checkpoint(path):
        raise CheckpointError(f"resume={reference}: no such run folder or .ckpt file{nearest(reference)}")
    run = path.parent.parent
    return run if (run / OVERRIDES).exists() else None


def _checkpoints(search: Callable[[str], Iterable[Path]]) -> list[Path]:
    """Checkpoints in a run folder: single files, and folders of sharded ones."""
    return [path for path in search("checkpoints/*.ckpt") if is_checkpoint(path)]


def _saved_overrides(run: Path) -> list[str]:
    """Overrides that the run was started with; [] where the folder has no `.hydra`."""
    path = run / OVERRIDES
    return read_overrides(path) if os.path.lexists(path) else []


def choose_checkpoint(reference: str, run: Path) -> Path:
    """The checkpoint to resume from: the newest valid one for `auto` and for a folder, otherwise the one that is
    named.

    Validity is decided by reading: `read_contents` checks format and completeness, `check_resumable` that there
    is an optimizer state. With `auto` an invalid one is reported on stderr and the one before it is taken; a
    named one is never replaced silently, its CheckpointError names the newest valid one instead.
    """
    from genai_pl.callbacks import newest_checkpoints
    from genai_pl.checkpoints.file import check_resumable, read_contents

    path = Path(reference)
    is_named = is_checkpoint(path)
    folder = run / "checkpoints" if reference == "auto" else path.parent if is_named else path / "checkpoints"
    # candidates, the wanted one first
    candidates = newest_checkpoints(folder)
    if is_named:
        candidates = [path, *(c for c in candidates if not c.samefile(path))]
    first_error: CheckpointError | None = None
    # the first that can be read whole
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
    """The `resuming` line: step of the checkpoint, and which state comes back."""
    from genai_pl.checkpoints.file import read_contents

    contents = read_contents(checkpoint)
    return (
        f"resuming    {checkpoint}: step {contents['global_step']}; "
        "weights, optimizer, schedule, random numbers and data position restored"
    )
