"""The Hydra job of a run: what was typed, and the command lines by which it goes on."""

import re
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from genai_pl.training.sweeps import saved_overrides
from genai_pl.training.trust import CONF, PER_COMMAND, key_of, untrusted_overrides


def job_overrides(kind: str = "task") -> list[str]:
    """The overrides of this command as they were typed: reading them one by one would fill in what `${...}` asks for.

    None where no command was typed: its function is called by itself.
    """
    if not HydraConfig.initialized():
        return []
    return OmegaConf.to_container(HydraConfig.get().overrides[kind], resolve=False)


def is_search_job() -> bool:
    """Whether this is a job of a sweep whose sweeper chooses the next values by what a job gives back."""
    hydra = HydraConfig.get()
    return hydra.mode is RunMode.MULTIRUN and not hydra.sweeper._target_.endswith(".BasicSweeper")


def job_sweep() -> Path | None:
    """The sweep that this run is a job of; None for that of a search, which goes on by a storage of its own."""
    hydra = HydraConfig.get()
    return shown_path(Path(hydra.sweep.dir)) if hydra.mode is RunMode.MULTIRUN and not is_search_job() else None


def resume_arguments(sweep: Path | None) -> list[str]:
    """The words of this command line that the folder of a run, or sweep, is not believed: a resume takes them from its own."""
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
    """The path as a person would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def rank_command(config: DictConfig) -> list[str]:
    """The command line by which another process joins this run: its own overrides, without the sweep it may belong to."""
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    return [
        *(sys.executable, str(CONF.parent / "train.py"), "--config-name", hydra.job.config_name),
        *(part for folder in folders for part in ("--config-dir", folder)),
        *(override for override in job_overrides("hydra") if override.startswith("hydra.searchpath")),
        *job_overrides(),
        # the first process writes the run folder and its log
        *(
            f"hydra.run.dir={quote_for_hydra(config.output_dir)}",
            "hydra.output_subdir=null",
            "hydra/job_logging=disabled",
        ),
    ]


def quote_for_hydra(value: str) -> str:
    """The value in quotes, as Hydra reads it."""
    text = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value)
    return "'" + text.replace("${", "\\${") + "'"
