"""torchrun whose nodes leave and come back: agents on this machine, one of which is killed with its process and started again."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.preemptions import last_step
from tests.cluster.runs import OPTIONS, PLAIN, TRAIN, prepare, torchrun
from tests.cluster.slurm import command_of, free_ports, kill, parent_of, pids, wait_until
from tests.strategies.processes import MODEL, assert_equal_to_the_last_bit, table

pytestmark = pytest.mark.slow
STEPS = 40
FORGOTTEN = 12  # seconds after which the meeting knows that a node is lost: three keep-alives of 2 s, and time to spare
LENGTH = (f"trainer.max_steps={STEPS}", "callbacks.checkpoint.every_n_steps=2")


class Node:
    """An agent of torchrun with one process.

    folder: of the run. nodes: as of --nnodes. port: of the meeting, which is at the node called first
    """

    def __init__(self, folder: Path, *options: str, nodes: str, port: int, name: str) -> None:
        meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic")
        waiting = "--rdzv-conf=join_timeout=600,last_call_timeout=5,keep_alive_interval=2,keep_alive_max_attempt=3"
        waiting += (
            f",is_host={name == 'first'}"  # both addresses are this machine's: else the one that comes first is it
        )
        agent = ("-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=9")
        with (folder / f"{name}.log").open("ab") as log:
            self.agent = subprocess.Popen(
                [
                    sys.executable,
                    *agent,
                    *meeting,
                    waiting,
                    "--local-addr=127.0.0.1",
                    *TRAIN[1:],
                    *OPTIONS,
                    *LENGTH,
                    *options,
                ],
                cwd=folder,
                env={
                    **PLAIN,
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                },  # a node that comes in later: see docs/scaling.md
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def lose(self) -> None:
        """End agent and processes as a power cut does."""
        processes = [pid for pid in pids() if parent_of(pid) == self.agent.pid and "train.py" in command_of(pid)]
        for pid in (self.agent.pid, *processes):
            kill(pid)
        self.agent.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with an undisturbed run of two processes."""
    prepare(tmp_path)
    torchrun(tmp_path, *OPTIONS, *LENGTH, "output_dir=undisturbed")
    return tmp_path


def end(folder: Path, *nodes: Node) -> None:
    """All agents end well."""
    for node in nodes:
        assert node.agent.wait(timeout=1800) == 0, "".join(path.read_text() for path in folder.glob("*.log"))


def test_a_node_that_leaves_and_comes_back_changes_no_bit(folder: Path) -> None:
    run, port = folder / "elastic", free_ports(1)[0]
    options = {"nodes": "2", "port": port}
    words = ("resume=auto", "output_dir=elastic")
    first, second = (Node(folder, *words, **options, name=name) for name in ("first", "second"))
    wait_until(lambda: last_step(run) >= 5, "step 5", seconds=900)
    second.lose()
    time.sleep(FORGOTTEN)
    again = Node(folder, *words, **options, name="again")
    end(folder, first, again)
    assert "resuming " in (run / "train.log").read_text()
    assert_equal_to_the_last_bit(run, folder / "undisturbed", MODEL)


def test_a_run_goes_on_with_one_node_and_takes_the_other_back(folder: Path) -> None:
    run, port = folder / "elastic", free_ports(1)[0]
    options = {"nodes": "1:2", "port": port}
    words = ("resume=auto", "output_dir=elastic", "trainer.accumulate_grad_batches=${per_process:8}")
    first = Node(folder, *words, **options, name="first")
    second = Node(folder, *words, **options, name="second")
    wait_until(lambda: last_step(run) >= 5, "step 5", seconds=900)
    second.lose()
    left = last_step(run)
    wait_until(lambda: last_step(run) >= left + 4, "steps of one node", seconds=900)
    again = Node(folder, *words, **options, name="again")
    end(folder, first, again)
    # as many rows in every step: the same but for the order of sums, and dropout, which differs between processes
    log = (run / "train.log").read_text()
    assert log.count("(2 rows x 32 x 4 batches x 2 devices)") >= 2
    assert "(2 rows x 32 x 8 batches x 1 devices)" in log
    expected, actual = table(folder / "undisturbed"), table(run)
    assert actual.keys() == expected.keys()
    for step in expected:
        assert float(actual[step]["train/tokens_seen"]) == float(expected[step]["train/tokens_seen"])
