"""Launchers of Hydra that run each job of a sweep as a command of its own: on Slurm, or as tasks of Ray.

Hydra's launchers for them run the job inside of a pickled function, in which a job that lost its node begins anew. A command
with `resume=auto` and its folder written out continues instead, however often it is started, and can be read and typed.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from genai_pl.atomic_io import is_checkpoint
from genai_pl.errors import TrainingError, UserError
from genai_pl.signals import end_at_once
from genai_pl.training.hydra_job import job_command, resume_arguments
from genai_pl.training.sweeps import read_results
from genai_pl.training.trust import key_of


class Job(NamedTuple):
    """A job of a sweep.

    number: its position in the sweep. folder: of its run. command: argv that begins or continues it.
    """

    number: int
    folder: Path
    command: list[str]


class JobLauncher(Launcher):
    """Launcher whose jobs are commands; a subclass has `start`, which returns when all have ended."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra gives."""
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run the jobs that are not finished; the value of `optimized_metric` of each.

        Raises UserError if one of a grid has not come to its end, and for a sweep whose jobs hold runs already.
        """
        sweep = Path(self.config.hydra.sweep.dir).absolute()
        # compose all first: a mistake in one of them costs no job
        composed = [self._compose(list(o), initial_job_idx + n, sweep) for n, o in enumerate(job_overrides)]
        configs, folders = [config for config, _ in composed], [folder for _, folder in composed]
        for config, folder in zip(configs, folders, strict=True):
            if config.resume != "auto" and any(map(is_checkpoint, folder.glob("checkpoints/*.ckpt"))):
                raise UserError(f"{folder}: holds a run already; python train.py -m {shlex.quote(f'resume={sweep}')}")
        jobs = [
            Job(initial_job_idx + n, folder, self._command(config, list(overrides), folder))
            for n, (config, folder, overrides) in enumerate(zip(configs, folders, job_overrides, strict=True))
            if self._results(config, folder) is None
        ]
        # a signal ends the wait, not the jobs
        sweep.mkdir(parents=True, exist_ok=True)
        if jobs:
            end_at_once(self.stopped(sweep), grace_period=self.config.trainer.grace_period)
            self.start(jobs, sweep)
        return self._collect(configs, folders, job_overrides)

    def start(self, jobs: list[Job], sweep: Path) -> None:
        """Run all jobs, each again when it is lost; return when none is left."""
        raise NotImplementedError

    def stopped(self, sweep: Path) -> str:
        """The last line after a signal: what becomes of the jobs."""
        raise NotImplementedError

    def _compose(self, overrides: list[str], number: int, sweep: Path) -> tuple[DictConfig, Path]:
        """The configuration of a job, and its folder."""
        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        HydraConfig.instance().set_config(config)  # what ${hydra:job.num} reads
        return config, sweep / str(config.hydra.sweep.subdir)

    def _command(self, config: DictConfig, overrides: list[str], folder: Path) -> list[str]:
        """The command of a job, as a single run in its folder."""
        own = [o for o in overrides if key_of(o) not in ("resume", "output_dir")]
        return [*job_command(config.hydra, own, str(folder)), "resume=auto"]

    def _results(self, config: DictConfig, folder: Path) -> dict[str, float] | None:
        """Results of a finished job, else None."""
        return read_results(folder, config.trainer.max_steps)

    def _collect(
        self, configs: list[DictConfig], folders: list[Path], job_overrides: Sequence[Sequence[str]]
    ) -> list[JobReturn]:
        """What each job has measured; UserError if some have no results, unless a sweeper searches: NaN fails a trial."""
        results = [self._results(config, folder) for config, folder in zip(configs, folders, strict=True)]
        unfinished = [str(folder) for folder, result in zip(folders, results, strict=True) if result is None]
        searches = not self.config.hydra.sweeper._target_.endswith(".BasicSweeper")
        if unfinished and not searches:
            sweep = Path(self.config.hydra.sweep.dir)
            again = shlex.join([*resume_arguments(sweep), f"resume={sweep}"])
            raise TrainingError(
                f"{len(unfinished)} of {len(folders)} jobs have not finished: {', '.join(unfinished)}; "
                f"their train.log says why, python train.py {again} continues them"
            )
        name = self.config.optimized_metric
        return [
            JobReturn(
                overrides=list(overrides),
                cfg=config,
                working_dir=str(folder),
                status=JobStatus.COMPLETED,
                _return_value=math.nan if result is None else result.get(name),
            )
            for overrides, config, folder, result in zip(job_overrides, configs, folders, results, strict=True)
        ]
