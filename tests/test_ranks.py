"""Ranks by the variables of torchrun, srun and our own launcher."""

import pytest

from genai_pl.ranks import RANK_VARIABLES, TASKS, is_first_process, started_by_srun, started_together

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
