"""Processes that srun has started: numbers, address and port, and what does not fit together."""

import os
from itertools import product

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from genai_pl.cli.command import run_folder_name
from genai_pl.errors import ConfigError
from genai_pl.ranks import RANK_VARIABLES
from genai_pl.strategies import choose_environment, started_devices
from genai_pl.strategies.slurm import PORTS, SlurmTasks

STEP = {  # of task 3 of 4 on two nodes, as Slurm 22.05 sets them
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
DEFAULTS = {"devices": 1, "num_nodes": 1}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch):
    """`variables(NAME=...)`: these, and no others of a launcher."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # environments set the address for others
    others = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    for name in (*STEP, *RANK_VARIABLES, *others):
        monkeypatch.delenv(name, raising=False)

    def give(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


def test_tasks_of_srun_are_ranks(variables) -> None:
    variables(STEP)
    environment = choose_environment()
    assert isinstance(environment, SlurmTasks)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    assert (environment.local_rank(), environment.node_rank()) == (1, 1)
    assert environment.main_address == "gpu07"
    assert environment.main_port in PORTS
    assert started_devices({"devices": "auto", "num_nodes": 1}) == {"devices": 2, "num_nodes": 2}
    assert run_folder_name(None, "12-00-00") == "slurm-1234-0"
    assert run_folder_name("mine", "12-00-00") == "mine"


def test_steps_of_a_job_and_jobs_take_ports_of_their_own(variables, monkeypatch: pytest.MonkeyPatch) -> None:
    variables(STEP)
    ports = set()
    for job, step in product(range(1200, 1300), range(7)):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        variables({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        ports.add(SlurmTasks().main_port)
    assert len(ports) == 700
    assert ports <= set(PORTS)


def test_an_address_and_port_of_the_user_are_taken(variables) -> None:
    variables({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert (SlurmTasks().main_address, SlurmTasks().main_port) == ("10.0.0.1", 5000)


@pytest.mark.parametrize("extra", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_and_a_single_task_start_their_own_processes(extra: dict[str, str], variables) -> None:
    variables({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a", **extra})
    assert isinstance(choose_environment(), LightningEnvironment)
    assert started_devices({"devices": 4, "num_nodes": 1}) == {}
    assert run_folder_name(None, "12-00-00") == "12-00-00"


def test_torchrun_inside_of_srun_counts(variables) -> None:
    elastic = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"}
    variables({**STEP, **elastic, "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert isinstance(choose_environment(), TorchElasticEnvironment)
    assert started_devices(DEFAULTS) == {"devices": 8, "num_nodes": 2}


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({}, {"devices": 8}, "trainer.devices=8: srun has started 2 a node; srun --ntasks-per-node=8"),
        ({}, {"num_nodes": 4}, "trainer.num_nodes=4: srun has started tasks on 2; srun --nodes=4"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,1"}, {}, "srun has started 3, 1 tasks on its nodes; .* --ntasks-per-node=N"),
        ({"SLURM_STEP_NUM_TASKS": "1"}, {"num_nodes": 2}, "trainer.num_nodes=2: in a job of Slurm start it by srun"),
    ],
)
def test_what_does_not_fit_is_refused(extra: dict[str, str], options: dict, message: str, variables) -> None:
    variables({**STEP, **extra})
    with pytest.raises(ConfigError, match=message):
        started_devices({**DEFAULTS, **options})


BY_HAND = {
    "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0": "but no LOCAL_WORLD_SIZE: start the processes by torchrun",
    "RANK=2 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2": "ranks go from 0 to one less than the size",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2": "ranks go from 0 to one less than the size",
    "RANK=x WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=2": "ranks go from 0 to one less than the size",
}


@pytest.mark.parametrize("given", BY_HAND)
def test_ranks_that_were_numbered_wrongly_by_hand_are_refused(given: str, variables) -> None:
    variables(dict(word.split("=") for word in given.split()))
    with pytest.raises(ConfigError, match=BY_HAND[given]):
        started_devices(DEFAULTS)


def test_a_pod_of_one_process_needs_no_torchrun(variables) -> None:
    variables({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"})
    assert started_devices(DEFAULTS) == {}
