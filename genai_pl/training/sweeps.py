"""Sweeps that go on: the saved command line of a multirun folder, and the results that mark its finished jobs.

A sweep is killed by a queue's time limit more often than a run is. `-m resume=auto` restarts it with the overrides
in its `multirun.yaml`: Hydra makes the same jobs in the same folders, a job with `results.json` is skipped, one
with checkpoints resumes, the others start. That needs the same grid, because Hydra numbers jobs by their position:
a changed or added sweep value is refused. Sweepers that search (Optuna) keep a storage of their own.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from genai_pl.atomic_io import RESULTS, SWEEP, write_atomic
from genai_pl.errors import UserError
from genai_pl.training.trust import PER_COMMAND, check_links, key_of, read_overrides, trusted_overrides, value_of

ROOT = "multirun"


class Outcome(NamedTuple):
    """Result of a command.

    status: its exit status, 0 or that of the signal or error. value: the last value of `optimized_metric`, for
    a sweeper that searches; NaN for a diverged trial; None where nothing was measured.
    """

    status: int
    value: float | None = None


def replay_sweep(arguments: list[str]) -> list[str]:
    """The command line that goes on with the newest sweep, or with that of `hydra.sweep.dir`.

    arguments: the words typed now, with -m and resume=auto. Saved overrides come first, then these. UserError
    where a swept option differs from the sweep's own, and for a sweeper other than Hydra's basic one.
    """
    typed = {key_of(a): a for a in arguments}
    sweep_dir = typed.get("hydra.sweep.dir")
    folder = _newest_sweep(Path(value_of(sweep_dir) if sweep_dir else ROOT))
    if folder is None:
        print("resume=auto: no sweep to continue, starting a new one", flush=True)
        return [a for a in arguments if key_of(a) != "resume"]
    # nothing in the sweep or its jobs may be a link to another place
    for job in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        check_links(job)
    saved = saved_overrides(folder)
    saved_by_key = {key_of(o): o for o in saved if key_of(o) not in PER_COMMAND}
    # the grid must be the same: job numbers are positions in it
    for key, argument in typed.items():
        saved_override = saved_by_key.get(key)
        if saved_override != argument and (
            _is_swept(argument) or (saved_override is not None and _is_swept(saved_override))
        ):
            description = f"was started with {saved_override}" if saved_override else f"was started without {key}"
            raise UserError(
                f"resume=auto: the sweep {folder} {description}, not {argument}; leave out resume to start another"
            )
    sweeper = saved_by_key.get("hydra/sweeper", typed.get("hydra/sweeper"))
    if sweeper and value_of(sweeper) != "basic":
        raise UserError(f"resume=auto: a sweep of {sweeper} goes on by its own storage: see docs/sweeps.md")
    trusted = trusted_overrides(saved_by_key.values(), folder / SWEEP, arguments)
    print(f"resume=auto: going on with the sweep {folder}", flush=True)
    # argparse takes positional words in one row: flags first
    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if not a.startswith("-")]
    return [*flags, *trusted, *overrides, *([] if sweep_dir else [f"hydra.sweep.dir='{folder}'"])]


def write_results(run: Path, step: int, metrics: dict[str, float], *, stopped_early: bool = False) -> None:
    """Write results.json: the last step, and the validation metrics at the end. Its presence marks the run as
    finished.
    """
    early = {"stopped_early": True} if stopped_early else {}
    text = json.dumps({"step": step, **early, **metrics}, indent=2) + "\n"
    write_atomic(run / RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def read_results(run: Path, max_steps: int | None) -> dict[str, float] | None:
    """Contents of results.json if the run is finished, else None; a max_steps above its last step makes it
    unfinished again, unless it was stopped early.

    A damaged or foreign file counts as none: the job then resumes, which costs one step at most.
    """
    try:
        results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
        step = {name: value for name, value in results.items() if isinstance(value, int | float)}["step"]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError):
        return None  # missing, damaged or of another program
    return results if results.get("stopped_early") is True or step >= (max_steps or 0) else None


def _newest_sweep(root: Path) -> Path | None:
    """The sweep below `root` with the latest checkpoint of any job."""
    files = [root / SWEEP] if (root / SWEEP).exists() else list(root.rglob(SWEEP))
    return max((path.parent for path in files), key=_saved_last) if files else None


def _saved_last(sweep: Path) -> float:
    """Time of a sweep's latest checkpoint, in seconds since the epoch; without any, the time at which the sweep
    was started.

    The folder's own modification time would not do: a job that is being written changes folders two levels
    below.
    """
    from genai_pl.references import saved_last

    jobs = (saved_last(job, exports=False) for job in sweep.iterdir() if job.is_dir())
    return max((saved for saved, _ in filter(None, jobs)), default=(sweep / SWEEP).stat().st_mtime)


def saved_overrides(folder: Path) -> list[str]:
    """Command line of a sweep without its flags, from its multirun.yaml: Hydra's own overrides, then ours."""
    return [o for kind in ("hydra", "task") for o in read_overrides(folder / SWEEP, "hydra", "overrides", kind)]


def _is_swept(argument: str) -> bool:
    """True for an override with several values: a comma outside of brackets and quotes, or one of Hydra's sweep
    functions.

    >>> _is_swept("a=1,2"), _is_swept("a=choice(1,2)"), _is_swept("a=[1,2]"), _is_swept("a=1")
    (True, True, False, False)
    """
    value = argument.partition("=")[2]
    return bool(re.match(r"(choice|range|interval|glob)\(", value)) or ("," in value and value[0] not in "[{'\"")
