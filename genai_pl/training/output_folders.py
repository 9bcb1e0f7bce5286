"""Output folders before a run has started: names are reserved at once, and nothing remains of a run that never begins.

Two commands may start in the same second, so a folder's name is taken by creating the folder. But a typo in the
next option would then leave an empty folder, which `resume=auto` and `compare.py` would have to step over. This
module remembers what the command created (`_created_folders`) and what it wrote before the first step
(`_early_outputs`); `keep_outputs`, called when the first step begins, makes them permanent, and `remove_unstarted`,
called when the command ends, removes them otherwise.
"""

import os
import shlex
import shutil
from itertools import count
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from genai_pl.atomic_io import SWEEP
from genai_pl.ranks import is_first_process, started_together

_created_folders: list[Path] = []  # by this command; the empty ones are removed at its end
_early_outputs: list[Path] = []  # files and folders written before the first step


def reserve_folder(path: str) -> str:
    """The path, created now; with `-2`, `-3`, ... appended where it exists. Resolver `${unused:...}` of
    conf/config.yaml.

    Ranks that torchrun or Slurm started all evaluate this and must agree: there the path comes back as it is.
    """
    if started_together():
        return path
    for name in (path if n == 1 else f"{path}-{n}" for n in count(1)):
        new_folders = _missing_ancestors(Path(name))
        try:
            Path(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            break  # Hydra cannot create it either, and reports it
        _created_folders.extend(new_folders)
        return name
    return path


def register_early_output(path: Path) -> None:
    """Announce that `path` will be written before the first step: it is removed if the run never starts."""
    if is_first_process() and not path.exists():
        _created_folders.extend(_missing_ancestors(path.parent))
        _early_outputs.append(path.absolute())


def keep_outputs() -> None:
    """Make permanent what was written so far: the run has started."""
    _early_outputs.clear()


def remove_unstarted() -> None:
    """Remove early outputs of a run that has not started, and folders of this command that are empty, deepest
    first.
    """
    for path in _early_outputs:
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(set(_created_folders), key=lambda path: -len(path.parts)):
        _remove_empty(path)
    _early_outputs.clear()
    _created_folders.clear()


def remove_unstarted_job(folder: Path) -> None:
    """Remove the early outputs and the empty folder of one job of a sweep; the sweep's own folder stays."""
    for path in [*_early_outputs]:
        shutil.rmtree(path, ignore_errors=True)
    _early_outputs.clear()
    _remove_empty(folder)


def _missing_ancestors(path: Path) -> list[Path]:
    """The path and those of its parents that do not exist yet: the folders that mkdir(parents=True) would create."""
    path = path.absolute()
    return [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]


def _remove_empty(folder: Path) -> None:
    """Remove the folder if it is empty but for the file that Hydra writes before a sweep's first job."""
    try:
        if os.listdir(folder) == [SWEEP]:
            (folder / SWEEP).unlink()  # of a sweep without a job
        folder.rmdir()
    except OSError:
        pass  # not empty, or removed by another process


class HydraFolders(Callback):
    """Hydra callback (conf/config.yaml: hydra.callbacks) that notes which folders Hydra is about to create."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        """Note the folder of a run."""
        _expect_hydra_folder(config, "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        """Note the folder of a sweep."""
        _expect_hydra_folder(config, "hydra.sweep.dir")

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        """Print the command that ranks the jobs of the sweep, if any of them logged a metric."""
        try:
            folder = Path(OmegaConf.select(config, "hydra.sweep.dir"))
        except OmegaConfBaseException:
            return
        if is_first_process() and any(folder.rglob("metrics.csv")):
            print(f"next        python compare.py {shlex.quote(str(folder))}", flush=True)


def _expect_hydra_folder(config: DictConfig, key: str) -> None:
    """Note the missing folders on the path in Hydra's option `key`."""
    try:
        _created_folders.extend(_missing_ancestors(Path(OmegaConf.select(config, key))))
    except OmegaConfBaseException:
        return  # a value that only Hydra can resolve
