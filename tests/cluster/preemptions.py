"""A training on two nodes that is preempted again and again, compared with one that is not: steps that differ are counted.

    python tests/cluster/preemptions.py 20

Three kinds take turns: `scontrol requeue`, a job of a partition with priority, and SIGUSR1 as at the end of the time limit.
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cluster.runs import OPTIONS, SCRIPT, environment, here, prepare, torchrun
from tests.cluster.slurm import Cluster, field, running, wait_until
from tests.strategies.processes import assert_equal_to_the_last_bit, table

KINDS = ("requeue", "priority", "time")


def restarts(cluster: Cluster, job: str) -> int:
    """How often Slurm has requeued the job."""
    return int(field(cluster.run("scontrol", "show", "job", job), "Restarts"))


def preempt(cluster: Cluster, job: str, kind: str, folder: Path) -> None:
    """Preempt a job that trains, and return when it is requeued."""
    before = restarts(cluster, job)
    if kind == "requeue":
        cluster.run("scontrol", "requeue", job)
    elif kind == "priority":
        needs = ("--partition=high", "--nodes=2", "--ntasks-per-node=2", "--output=/dev/null", "--time=1")
        cluster.submit(*needs, "--wrap=sleep 1", cwd=folder)
    else:
        cluster.run("scancel", "--signal=USR1", job)
    wait_until(lambda: restarts(cluster, job) > before, f"{kind} of job {job}", seconds=900)


def length(times: int) -> int:
    """Steps of a run that is preempted so often and has not ended before."""
    return 20 * times


def last_step(run: Path) -> int:
    """The step that the run has logged last; 0 before the first."""
    try:
        return max(table(run), default=0)
    except (OSError, ValueError, KeyError):  # not there, or half a line
        return 0


def preempted(cluster: Cluster, folder: Path, *, times: int, steps: int, seed: int = 0) -> tuple[Path, list[int]]:
    """The folder of a run of so many steps that was preempted so often, and the steps at which it was."""
    draw, run, at = random.Random(seed), folder / "preempted", []
    job = cluster.submit(
        str(here(SCRIPT, folder)),
        *OPTIONS,
        f"trainer.max_steps={steps}",
        cwd=folder,
        env={**environment(cluster), "RUN": str(run)},
    )
    for n in range(times):
        reached = last_step(run)
        wanted = reached + draw.randint(1, 6)
        wait_until(lambda wanted=wanted: last_step(run) >= wanted, f"step {wanted}", seconds=900)
        at.append(last_step(run))
        kind = KINDS[n % len(KINDS)]
        preempt(cluster, job, kind, folder)
        print(f"{n + 1:3d}  {kind:10}at step {at[-1]}, went on from {last_step(run)}", flush=True)
    state = cluster.wait(job, seconds=1800)
    log = (folder / f"slurm-{job}.log").read_text(encoding="utf-8")
    assert state == "COMPLETED", log
    assert "Traceback" not in log, log
    return run, at


def main(times: int) -> None:
    """Preempt, compare, and print how many steps differ."""
    steps, began = length(times), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepare(Path(temporary) / "work")
        torchrun(folder, *OPTIONS, f"trainer.max_steps={steps}", "output_dir=undisturbed")
        with running(Path(temporary) / "cluster") as cluster:
            run, _ = preempted(cluster, folder, times=times, steps=steps)
        expected, actual = table(folder / "undisturbed"), table(run)
        names = ("train/loss", "train/grad_norm")
        differ = [step for step in expected if any(expected[step][n] != actual[step][n] for n in names)]
        assert_equal_to_the_last_bit(run, folder / "undisturbed", names=names)
        whole = subprocess.run(["grep", "-c", "^resuming", run / "train.log"], stdout=subprocess.PIPE, text=True)
    print(f"{times} preemptions, resumed {whole.stdout.strip()} times, {len(actual)} steps, {len(differ)} differ")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
