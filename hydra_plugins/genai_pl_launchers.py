"""Launchers of genai_pl where Hydra looks for them: it takes none whose class is defined outside of `hydra_plugins`."""

from genai_pl.training import ray_jobs, slurm_jobs


class SlurmLauncher(slurm_jobs.SlurmLauncher):
    """hydra/launcher=slurm."""


class RayLauncher(ray_jobs.RayLauncher):
    """hydra/launcher=ray."""
