"""Ranks by the variables of torchrun, srun and our own launcher."""

import pytest

from genai_pl.cli.command import per_process
from genai_pl.errors import ConfigError
from genai_pl.ranks import RANK_VARIABLES, TASKS, TORCH_VARIABLES, is_first_process, started_by_srun, started_together

JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}  # what a batch script has


@pytest.mark.parametrize(
    ("variables", "first", "by_srun", "together"),
    [
        ({}, True, False, False),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False, False, True),  # started by our first process
        ({"NODE_RANK": "1"}, False, False, False),  # the first process of a second machine
        ({"RANK": "0", "LOCAL_RANK": "0"}, True, False, True),  # torchrun
        ({"RANK": "2", "LOCAL_RANK": "0"}, False, False, True),
        (JOB, True, False, False),
        ({**JOB, TASKS: "1"}, True, False, False),
        ({**JOB, TASKS: "2"}, True, True, True),
        ({**JOB, TASKS: "2", "SLURM_PROCID": "1"}, False, True, True),
        # torchrun inside of srun: its rank 0 is where its agents have met first
        ({**JOB, TASKS: "2", "SLURM_PROCID": "1", "RANK": "0", "LOCAL_RANK": "0"}, True, False, True),
        ({**JOB, TASKS: "2", "RANK": "1", "LOCAL_RANK": "0"}, False, False, True),
    ],
)
def test_one_process_is_the_first(
    variables: dict[str, str], first: bool, by_srun: bool, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*RANK_VARIABLES, *JOB, TASKS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_first_process(), started_by_srun(), started_together()) == (first, by_srun, together)


@pytest.mark.parametrize(("processes", "part"), [("1", 8), ("2", 4), ("4", 2)])
def test_a_process_has_its_part_of_a_step(processes: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCH_VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert per_process(8) == part


def test_a_part_that_does_not_exist_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCH_VARIABLES, *JOB, TASKS):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun or srun counts the processes; without them give a number"):
        per_process(8)
    monkeypatch.setenv(TASKS, "3")
    with pytest.raises(ConfigError, match="8 cannot be divided among 3 processes"):
        per_process(8)
