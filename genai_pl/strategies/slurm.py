"""Tasks of Slurm as processes of a run: numbers, address and port, from the variables that srun sets.

Lightning's own environment reads the variables of the job instead, which a batch script has too: a command in it without srun
waits for processes that nobody has started. It also refuses tasks that were not given by --ntasks-per-node, and requeues.
"""

import os
import re
from collections.abc import Mapping

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from genai_pl.errors import ConfigError
from genai_pl.ranks import TASKS, TORCH_VARIABLES, started_by_srun, started_by_torch

PORTS = range(12_000, 32_000)  # free on most machines: system services are below, ports that Linux hands out above


class SlurmTasks(ClusterEnvironment):
    """The tasks of one srun as ranks. MASTER_ADDR and MASTER_PORT overrule the first node and a port made of the job's number."""

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        """Name of the first node of the step."""
        os.environ.setdefault(
            "MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
        )
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        """A port that all tasks find without asking, another one for each job and step."""
        job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
        os.environ.setdefault("MASTER_PORT", str(PORTS[(7 * job + step) % len(PORTS)]))
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        """Whether srun has started this process as one of several."""
        return started_by_srun()

    def world_size(self) -> int:
        """Number of tasks on all nodes."""
        return int(os.environ[TASKS])

    def set_world_size(self, size: int) -> None:
        """Nothing: Slurm decides."""

    def global_rank(self) -> int:
        """Number of this task."""
        return int(os.environ["SLURM_PROCID"])

    def set_global_rank(self, rank: int) -> None:
        """Nothing: Slurm decides."""

    def local_rank(self) -> int:
        """Number of this task on its node."""
        return int(os.environ["SLURM_LOCALID"])

    def node_rank(self) -> int:
        """Number of this node."""
        return int(os.environ["SLURM_NODEID"])


def choose_environment() -> ClusterEnvironment:
    """Lightning's view of who has started the processes: torchrun, Ray, srun, or nobody, so that this process starts them."""
    if started_by_torch():
        return TorchElasticEnvironment()
    return SlurmTasks() if SlurmTasks.detect() else LightningEnvironment()


def started_devices(options: Mapping[str, object]) -> dict[str, int]:
    """`devices` and `num_nodes` of Lightning's Trainer where torchrun, Ray or srun has started the processes; {} otherwise.

    options: of the group `trainer`. ConfigError where they ask for other numbers than srun was given, and for several nodes in
    a job of Slurm without srun.
    """
    check_ranks()
    if started_by_torch():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local}
    devices, nodes = options["devices"], options["num_nodes"]
    if not started_by_srun():
        if "SLURM_JOB_ID" in os.environ and nodes > 1 and "NODE_RANK" not in os.environ:
            raise ConfigError(
                f"trainer.num_nodes={nodes}: in a job of Slurm start it by srun, one task for each device"
            )
        return {}
    # as many tasks on each node, and no other number than the one that was typed
    counts = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    if len(set(counts)) > 1:
        shown = ", ".join(map(str, counts))
        raise ConfigError(f"srun has started {shown} tasks on its nodes; give each as many: srun --ntasks-per-node=N")
    if isinstance(devices, int) and devices not in (1, counts[0]):
        raise ConfigError(
            f"trainer.devices={devices}: srun has started {counts[0]} a node; srun --ntasks-per-node={devices}"
        )
    if nodes not in (1, len(counts)):
        raise ConfigError(f"trainer.num_nodes={nodes}: srun has started tasks on {len(counts)}; srun --nodes={nodes}")
    return {"devices": counts[0], "num_nodes": len(counts)}


def check_ranks() -> None:
    """ConfigError for variables of torchrun that were set by hand: some of several processes, or ranks that there are not."""
    names = sorted(TORCH_VARIABLES)
    given = {name: os.environ[name] for name in names if name in os.environ}
    shown = " ".join(f"{name}={value}" for name, value in given.items())
    if len(given) < len(names):
        if "RANK" in given and given.get("WORLD_SIZE", "1") != "1":
            missing = ", ".join(name for name in names if name not in given)
            raise ConfigError(
                f"{shown}, but no {missing}: start the processes by torchrun, which sets all, or unset them"
            )
        return
    numbers = {name: int(value) if value.isdecimal() else -1 for name, value in given.items()}
    if not (0 <= numbers["RANK"] < numbers["WORLD_SIZE"] and 0 <= numbers["LOCAL_RANK"] < numbers["LOCAL_WORLD_SIZE"]):
        raise ConfigError(f"{shown}: ranks go from 0 to one less than the size; torchrun sets all of them")


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node, from SLURM_STEP_TASKS_PER_NODE.

    >>> tasks_per_node("2(x3),1")
    [2, 2, 2, 1]
    """
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]
