"""Sweeps that go on: which one, with which settings, and what each of its jobs still has to do."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from genai_pl.atomic_io import RESULTS, SWEEP, write_atomic
from genai_pl.errors import UserError
from genai_pl.training.trust import PER_COMMAND, check_links, key_of, read_overrides, trusted_overrides

ROOT = "multirun"


class Outcome(NamedTuple):
    """How a command ended: its exit status, and the figure that a sweeper which searches is given."""

    status: int
    value: float | None = None


def replay_sweep(arguments: list[str]) -> list[str]:
    """The command line that goes on with the newest sweep, or that of hydra.sweep.dir: its own overrides, then the new ones."""
    typed = {key_of(a): a for a in arguments}
    sweep_dir = typed.get("hydra.sweep.dir")
    folder = _newest_sweep(Path(_value(sweep_dir) if sweep_dir else ROOT))
    if folder is None:
        print("resume=auto: no sweep to continue, starting a new one", flush=True)
        return [a for a in arguments if key_of(a) != "resume"]
    for job in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        check_links(job)
    saved = saved_overrides(folder)
    saved_by_key = {key_of(o): o for o in saved if key_of(o) not in PER_COMMAND}
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
    if sweeper and _value(sweeper) != "basic":
        raise UserError(f"resume=auto: a sweep of {sweeper} goes on by its own storage: see docs/sweeps.md")
    trusted = trusted_overrides(saved_by_key.values(), folder / SWEEP, arguments)
    print(f"resume=auto: going on with the sweep {folder}", flush=True)
    flags = [a for a in arguments if a.startswith("-")]  # argparse wants all that is no flag in one row
    overrides = [a for a in arguments if not a.startswith("-")]
    return [*flags, *trusted, *overrides, *([] if sweep_dir else [f"hydra.sweep.dir='{folder}'"])]


def write_results(run: Path, step: int, metrics: dict[str, float]) -> None:
    """Say that the run reached its end, and with which figures."""
    text = json.dumps({"step": step, **metrics}, indent=2) + "\n"
    write_atomic(run / RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def read_results(run: Path, max_steps: int | None) -> dict[str, float] | None:
    """The results of a run that reached its end, unless it is to take more steps now."""
    try:
        results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
        step = {name: value for name, value in results.items() if isinstance(value, int | float)}["step"]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError):
        return None  # none, or not one of ours
    return results if step >= (max_steps or 0) else None


def _newest_sweep(root: Path) -> Path | None:
    files = [root / SWEEP] if (root / SWEEP).exists() else list(root.rglob(SWEEP))
    return max((path.parent for path in files), key=_saved_last) if files else None


def _saved_last(sweep: Path) -> float:
    """When a job of the sweep was saved last, as its checkpoints say; before any was, when the sweep began."""
    from genai_pl.references import saved_last

    jobs = (saved_last(job, exports=False) for job in sweep.iterdir() if job.is_dir())
    return max((saved for saved, _ in filter(None, jobs)), default=(sweep / SWEEP).stat().st_mtime)


def saved_overrides(folder: Path) -> list[str]:
    """The command line by which a sweep was started, without its flags."""
    return [o for kind in ("hydra", "task") for o in read_overrides(folder / SWEEP, "hydra", "overrides", kind)]


def _value(argument: str) -> str:
    return argument.partition("=")[2].strip("'\"")


def _is_swept(argument: str) -> bool:
    value = argument.partition("=")[2]
    return bool(re.match(r"(choice|range|interval|glob)\(", value)) or ("," in value and value[0] not in "[{'\"")
