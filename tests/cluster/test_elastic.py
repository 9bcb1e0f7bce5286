"""torchrun over two nodes, one of which is lost and comes back: the run goes on from its last checkpoint."""

import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.runs import OPTIONS, PLAIN, TRAIN, prepare, torchrun
from tests.cluster.slurm import free_ports, kill, parent_of, pids, wait_until
from tests.strategies.processes import MODEL, assert_equal_to_the_last_bit, table

HEARTBEATS = (
    30  # seconds: torchrun takes a node for lost after three of five seconds, and confuses one that is back before
)
STEPS = ("trainer.max_steps=60", "callbacks.checkpoint.every_n_steps=5")


def listens(port: int) -> bool:
    """Whether a process of this machine answers at a port."""
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_node_of_torchrun_leaves_and_comes_back(tmp_path: Path) -> None:
    folder = prepare(tmp_path)
    torchrun(folder, *OPTIONS, *STEPS, "output_dir=undisturbed")
    run = folder / "elastic"
    (port,) = free_ports(1)
    meeting = f"--rdzv-endpoint=127.0.0.1:{port}"
    launch = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3")
    command = (TRAIN[0], *launch, "--rdzv-backend=c10d", meeting, TRAIN[1], *OPTIONS, *STEPS)

    def node(name: str) -> subprocess.Popen:
        """An agent of torchrun, which begins or continues the run; its output goes to a file."""
        with (folder / f"{name}.log").open("w") as log:
            again = ("resume=auto", f"output_dir={run}")
            return subprocess.Popen([*command, *again], cwd=folder, env=PLAIN, stdout=log, stderr=subprocess.STDOUT)

    def saved() -> int:
        """The step of the newest checkpoint."""
        return max((int(path.stem[5:]) for path in run.glob("checkpoints/step=*.ckpt")), default=0)

    # nodes meet at the first one, which stays
    agents = [node("one")]
    wait_until(lambda: listens(port), "the meeting point", seconds=120)
    agents.append(node("two"))
    wait_until(lambda: saved() >= 10, "a checkpoint", seconds=300)
    workers = [pid for pid in pids() if parent_of(pid) == agents[1].pid]
    for pid in (agents[1].pid, *workers):
        kill(pid)
    agents[1].wait()
    assert saved() < 60
    time.sleep(HEARTBEATS)
    agents[1] = node("again")
    statuses = [agent.wait(timeout=500) for agent in agents]
    shown = "".join((folder / f"{name}.log").read_text() for name in ("one", "again"))
    assert statuses == [0, 0], shown
    assert_equal_to_the_last_bit(run, folder / "undisturbed", MODEL)
    assert max(table(run)) == 60
    resumed = re.findall(r"^resuming .*: step (\d+)", (run / "train.log").read_text(), re.M)
    assert resumed
    assert int(resumed[0]) >= 10
