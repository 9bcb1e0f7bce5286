"""Jobs of a sweep as tasks of Ray: each is a command, on any node of a cluster or on this machine.

A task whose worker or node is lost is run again by Ray, and its command continues the run. All nodes see the same files.
"""

import ctypes
import os
import signal
import subprocess
from pathlib import Path

from genai_pl.errors import ConfigError
from genai_pl.training.job_launcher import Job, JobLauncher

PR_SET_PDEATHSIG = 1  # of Linux' prctl
ATTEMPTS = 20  # times that a job may be lost


class RayLauncher(JobLauncher):
    """Runs the jobs as tasks of Ray and waits for them.

    address: of a cluster, None for one on this machine, "auto" for the one that RAY_ADDRESS or this node knows. num_cpus,
    num_gpus: of each job.
    """

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float) -> None:
        self.address, self.num_cpus, self.num_gpus = address, num_cpus, num_gpus

    def stopped(self, sweep: Path) -> str:
        """The last line after a signal."""
        return f"the jobs end with it; python train.py -m 'resume={sweep}'"

    def start(self, jobs: list[Job], sweep: Path) -> None:
        """Run a task for each job, and return when all have ended."""
        try:
            import ray
        except ImportError:
            raise ConfigError("hydra/launcher=ray: not installed; pip install 'ray[default]'") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        # without an address Ray would take the cluster that RAY_ADDRESS or this node knows
        ray.init(address=self.address or "local", include_dashboard=False, log_to_driver=False)
        try:
            task = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=ATTEMPTS)(run_command)
            print(f"ray         {len(jobs)} jobs, output in ray-N.log in {sweep}", flush=True)
            where = {"folder": os.getcwd(), "python_path": os.environ.get("PYTHONPATH", "")}
            tasks = [task.remote(job.command, log=str(sweep / f"ray-{job.number}.log"), **where) for job in jobs]
            ray.wait(tasks, num_returns=len(tasks))
        finally:
            ray.shutdown()


def run_command(command: list[str], *, log: str, folder: str, python_path: str) -> int:
    """Exit status of a command whose output goes to `log`; it ends with the worker that runs it."""
    variables = {**os.environ, "PYTHONPATH": python_path}
    with open(log, "ab") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.run(command, cwd=folder, env=variables, preexec_fn=end_with_parent, **streams).returncode


def end_with_parent() -> None:
    """Let Linux kill this process as soon as the one that started it ends: its successor finds the folder free."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
