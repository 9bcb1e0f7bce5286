"""Ranks of processes by the variables that launchers set: ours, torchrun, and srun of Slurm.

Variables are read because this is needed before torch.distributed, and even torch, is imported. A batch script of Slurm has
the variables of a job, such as SLURM_NTASKS, but only the tasks that srun starts are processes of one run.
"""

import os

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # torchrun's, ours, and Slurm's
TORCH_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # enough to number the processes of a run
TASKS = "SLURM_STEP_NUM_TASKS"  # how many processes one srun has started


def is_first_process() -> bool:
    """True in the process that writes the run folder: rank 0 of all nodes.

    Inside of srun torchrun numbers processes as their nodes come, so its rank counts and not Slurm's.
    """
    names = RANK_VARIABLES[:1] if "RANK" in os.environ else RANK_VARIABLES
    return all(os.environ.get(name, "0") == "0" for name in names)


def started_by_torch() -> bool:
    """Whether torchrun, or Ray with the same variables, has started this process and decides on numbers of processes."""
    return os.environ.keys() >= TORCH_VARIABLES


def started_by_srun() -> bool:
    """Whether srun has started this run as several tasks, each of which is a process of it."""
    return "RANK" not in os.environ and os.environ.get(TASKS, "1") != "1"


def started_together() -> bool:
    """Whether something else than this process has started all processes of the run, which must find the same folder."""
    return started_by_srun() or not os.environ.keys().isdisjoint(RANK_VARIABLES[:2])


def n_started() -> int | None:
    """How many processes torchrun, Ray or srun has started as this run; None where none of them has."""
    if started_by_torch():
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ[TASKS]) if started_by_srun() else None
