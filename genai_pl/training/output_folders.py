"""Folders of runs that have not started yet: a name is taken at once, and nothing is left of it where no run came of it."""

import os
import shlex
import shutil
from itertools import count
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai_pl.atomic_io import SWEEP
from genai_pl.signals import RANK_VARIABLES

_created_folders: list[Path] = []  # folders that this command makes: what is empty of them at its end is removed
_early_outputs: list[Path] = []  # what it writes before the run has started


def reserve_folder(path: str) -> str:
    """The path, or with `-2`, `-3`, ... after it where another run has it: two may start in the same second."""
    if not os.environ.keys().isdisjoint(
        RANK_VARIABLES
    ):  # all processes of a run that torchrun or Slurm has started must find the same
        return path
    for name in (path if n == 1 else f"{path}-{n}" for n in count(1)):
        new_folders = _missing_ancestors(Path(name))
        try:
            Path(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            break  # Hydra cannot make it either, and says so
        _created_folders.extend(new_folders)
        return name
    return path


def is_first_process() -> bool:
    """Whether this process is the one that writes the run folder."""
    return all(os.environ.get(name, "0") == "0" for name in (*RANK_VARIABLES, "NODE_RANK"))


def register_early_output(path: Path) -> None:
    """Say that `path` is about to be written before the run has started; it goes if the run never does."""
    if is_first_process() and not path.exists():
        _created_folders.extend(_missing_ancestors(path.parent))
        _early_outputs.append(path.absolute())


def keep_outputs() -> None:
    """Say that the run has started: what was written stays."""
    _early_outputs.clear()


def remove_unstarted() -> None:
    """Remove what was written for a run that has not started, and the folders of this command that are empty."""
    for path in _early_outputs:
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(set(_created_folders), key=lambda path: -len(path.parts)):
        _remove_empty(path)
    _early_outputs.clear()
    _created_folders.clear()


def remove_unstarted_job(folder: Path) -> None:
    """Remove the folder of a job of a sweep that has not started."""
    for path in [*_early_outputs]:
        shutil.rmtree(path, ignore_errors=True)
    _early_outputs.clear()
    _remove_empty(folder)


def _missing_ancestors(path: Path) -> list[Path]:
    path = path.absolute()
    return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]


def _remove_empty(folder: Path) -> None:
    try:
        if os.listdir(folder) == [SWEEP]:
            (folder / SWEEP).unlink()  # of a sweep without a job
        folder.rmdir()
    except OSError:
        pass  # something lies in it, or somebody else was faster


class HydraFolders(Callback):
    """Remembers which folders Hydra makes, before it does."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        _expect_hydra_folder(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        _expect_hydra_folder(config, "hydra.sweep.dir")

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Print the command that ranks the jobs, which all have ended."""
        try:
            folder = Path(OmegaConf.select(config, "hydra.sweep.dir"))
        except OmegaConfBaseException:
            return
        if is_first_process() and any(folder.rglob("metrics.csv")):
            print(f"next        python compare.py {shlex.quote(str(folder))}", flush=True)


def _expect_hydra_folder(config: DictConfig, key: str) -> None:
    try:
        _created_folders.extend(_missing_ancestors(Path(OmegaConf.select(config, key))))
    except OmegaConfBaseException:
        return  # known to Hydra alone, which reads it later
