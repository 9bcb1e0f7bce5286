"""The processes of a run on one machine: started by one command, ended together."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

MARK = "GENAI_PL_LAUNCHER"  # names the process id of the first process to those that it starts
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
PERIOD, GRACE = 0.5, 5.0  # seconds between two looks at the others, and for telling one's own error


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the further processes of this machine by the command it was given; when one is lost, all end."""

    def __init__(self, replaced: _SubprocessScriptLauncher, command: list[str]) -> None:
        super().__init__(replaced.cluster_environment, replaced.num_processes, replaced.num_nodes)
        self.command = command
        self._has_started = False

    def launch(self, function: Callable, *args: object, trainer: L.Trainer | None = None, **given: object) -> object:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._start()
        return function(*args, **given)

    def _start(self) -> None:
        self._has_started = True
        environment = self.cluster_environment
        values = (environment.main_address, environment.main_port, environment.node_rank(), 0)
        os.environ.update(zip(VARIABLES, map(str, (*values, self.num_processes * self.num_nodes)), strict=True))
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.num_processes))
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        for rank in range(1, self.num_processes):
            variables = {**os.environ, "LOCAL_RANK": str(rank), MARK: str(os.getpid())}
            self.procs.append(subprocess.Popen(self.command, env=variables))
        threading.Thread(target=_watch, args=(self.procs,), daemon=True).start()

    def explain(self) -> None:
        """End the run with one line if a process was killed: what this one met is that the other no longer answers."""
        deadline = time.monotonic() + PERIOD
        while time.monotonic() < deadline:
            for rank, process in enumerate(self.procs, 1):
                if (process.poll() or 0) < 0:
                    _end(self.procs, rank)
            time.sleep(PERIOD / 10)

    def close(self, *, failed: bool) -> None:
        """End what was started, so that this process can start another run."""
        for process in self.procs:
            if failed:
                process.kill()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._has_started:  # a run of one process has set them too
            for name in VARIABLES:
                os.environ.pop(name, None)
        self.procs.clear()


@contextmanager
def launched(trainer: L.Trainer) -> Iterator[None]:
    """Around everything that the processes of a run do together: nothing of them is left afterwards."""
    launcher = trainer.strategy.launcher
    try:
        yield
        if dist.is_initialized():
            trainer.strategy.barrier()
    except BaseException as error:
        if MARK in os.environ:
            time.sleep(GRACE / 2)  # the first process tells what all of them met
        if isinstance(launcher, RankLauncher):
            if isinstance(error, Exception):
                launcher.explain()
            launcher.close(failed=True)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    if isinstance(launcher, RankLauncher):
        launcher.close(failed=False)


def follow_launcher() -> None:
    """End this process as soon as the one that started it has ended."""
    if MARK in os.environ:
        threading.Thread(target=_follow, args=(int(os.environ[MARK]),), daemon=True).start()


def _follow(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(PERIOD)
    if os.environ["LOCAL_RANK"] == "1":  # one tells for all
        print("error: process 0 of the run was lost; all end here", file=sys.stderr, flush=True)
    os._exit(1)


def _watch(processes: list[subprocess.Popen]) -> None:
    """End this process, and with it all others, when one that it started has failed."""
    lost: list[tuple[int, int]] = []
    while processes and not lost:
        time.sleep(PERIOD)
        lost = [(rank, process.poll()) for rank, process in enumerate(processes, 1) if process.poll()]
    if not lost:
        return
    rank, status = min(lost, key=lambda found: found[1])  # one that was killed made the others fail
    if status > 0:  # it has told why, and this process may be about to
        time.sleep(GRACE)
    _end(processes, rank)


def _end(processes: list[subprocess.Popen], rank: int) -> None:
    status = processes[rank - 1].poll()
    for process in processes:
        process.kill()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    print(f"error: process {rank} of the run {how}; all end here", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
