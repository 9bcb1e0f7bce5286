"""Hydra's job: its overrides as typed, and the command lines by which this run goes on or is joined by other
processes.
"""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from genai_pl.training.sweeps import saved_overrides
from genai_pl.training.trust import CONF, PER_COMMAND, key_of, untrusted_overrides

if TYPE_CHECKING:
    from genai_pl.training.precision import Precision


def job_overrides(kind: str = "task") -> list[str]:
    """Overrides of this Hydra job as text, `kind` "task" (ours) or "hydra"; [] where a command's function is
    called without Hydra.

    They are not resolved: iterating the node would replace `${oc.env:TOKEN}` by its value, which would then be
    written to files.
    """
    if not HydraConfig.initialized():
        return []
    return OmegaConf.to_container(HydraConfig.get().overrides[kind], resolve=False)


def is_search_job() -> bool:
    """True for a job of a sweeper that chooses the next values by the returned metric (Optuna); False for grids
    and single runs.
    """
    hydra = HydraConfig.get()
    return hydra.mode is RunMode.MULTIRUN and not hydra.sweeper._target_.endswith(".BasicSweeper")


def job_sweep() -> Path | None:
    """Folder of the sweep that this run is a job of, relative to here; None outside, and for a search, which has
    its own storage.
    """
    hydra = HydraConfig.get()
    return shown_path(Path(hydra.sweep.dir)) if hydra.mode is RunMode.MULTIRUN and not is_search_job() else None


def resume_arguments(sweep: Path | None) -> list[str]:
    """Words that `python train.py ... resume=` needs beside the folder: those that `trust` would refuse to read
    out of the run folder.

    sweep: the folder of a sweep that goes on as a whole (`-m`), or None for a single run.
    """
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    config_dirs = [f"--config-dir={shown_path(Path(folder))}" for folder in folders]
    search_paths = [o for o in job_overrides("hydra") if o.startswith("hydra.searchpath")]
    arguments = [*config_dirs, *search_paths]
    if sweep is None:
        return [*arguments, *untrusted_overrides(job_overrides(), arguments)]
    saved = [o for o in saved_overrides(sweep) if key_of(o) not in {*PER_COMMAND, "hydra.searchpath"}]
    return ["-m", *arguments, *untrusted_overrides(saved, arguments)]


def shown_path(path: Path) -> Path:
    """The path relative to the working folder where it is below it: as a person would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def rank_command(config: DictConfig, precision: "Precision") -> list[str]:
    """Command line of another rank of this run on this machine: the same overrides, as one plain run with the
    folder and the precision written out.

    Lightning's launcher repeats sys.argv instead, which names the wrong folder after `resume=` and starts a
    sweep in a sweep. The other ranks write neither `.hydra/` nor a log.
    """
    return [
        *job_command(HydraConfig.get(), job_overrides(), config.output_dir),
        f"precision.lightning={precision.lightning}",
        f"precision.matmul={precision.matmul}",
        # the first process writes the run folder and its log
        *("hydra.output_subdir=null", "hydra/job_logging=disabled"),
    ]


def job_command(hydra: DictConfig, overrides: list[str], folder: str) -> list[str]:
    """Command line of one plain run in a folder, with options and search path of a job of Hydra, whose node is `hydra`."""
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    typed = OmegaConf.to_container(hydra.overrides.hydra, resolve=False)
    return [
        *(sys.executable, str(CONF.parent / "train.py"), "--config-name", hydra.job.config_name),
        *(part for folder in folders for part in ("--config-dir", folder)),
        *(override for override in typed if override.startswith("hydra.searchpath")),
        *overrides,
        f"hydra.run.dir={quote_for_hydra(folder)}",
    ]


def quote_for_hydra(value: str) -> str:
    r"""The value in single quotes as Hydra's grammar reads it: quotes and backslashes before them escaped, `${`
    left alone.

    >>> print(quote_for_hydra("it's ${here}"))
    'it\'s \${here}'
    """
    text = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + text.replace("${", "\\${") + "'"
