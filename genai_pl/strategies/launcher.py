"""Processes of a run on one machine: started by one command, and ended together.

The first process starts the others with the same command and watches them; each of them watches the first. When one is
killed, fails, or stays stopped for too long, all end within seconds and one line says why, instead of a collective
that waits for minutes.

An error usually shows first in the wrong process: the others see a closed connection. So a process whose connection
breaks waits a moment for the process that failed to be noticed, and the processes started by the first let it report
for all.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from genai_pl import signals
from genai_pl.errors import TrainingError

MARK = "GENAI_PL_LAUNCHER"  # environment variable with the process id of the first process, for those that it starts
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
CLOSED = re.compile(r"[Cc]onnection (closed|reset)|Broken pipe")  # by another process that has ended
LOST = re.compile(r"[Cc]onnection (closed|reset)|Broken pipe|peer")  # in messages of gloo and NCCL
PERIOD, GRACE = 0.5, 5.0  # seconds between two looks at the others, and to report one's own error


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the further processes of this machine; when one is lost, all end.

    replaced: Lightning's launcher, whose environment and numbers of processes and nodes it takes
    command: argv of the other processes, the command of this one
    """

    def __init__(self, replaced: _SubprocessScriptLauncher, command: list[str]) -> None:
        super().__init__(replaced.cluster_environment, replaced.num_processes, replaced.num_nodes)
        self.command = command
        self.is_done = False  # whether this process has finished its work
        self.all_are_done = False  # whether all processes have
        self._has_started = False

    def launch(self, function: Callable, *args: object, trainer: L.Trainer | None = None, **kwargs: object) -> object:
        """Start the other processes, unless torchrun or SLURM has, and call the function in this one."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._start()
        return function(*args, **kwargs)

    def _start(self) -> None:
        """Set the variables that number the processes, start the others, and watch them in a thread."""
        self._has_started = True
        environment = self.cluster_environment
        values = (environment.main_address, environment.main_port, environment.node_rank(), 0)
        os.environ.update(zip(VARIABLES, map(str, (*values, self.num_processes * self.num_nodes)), strict=True))
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.num_processes))
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        signals.AT_END.append(self._kill)
        for rank in range(1, self.num_processes):
            variables = {**os.environ, "LOCAL_RANK": str(rank), MARK: str(os.getpid())}
            self.procs.append(subprocess.Popen(self.command, env=variables))
        threading.Thread(target=self._watch, daemon=True).start()

    def end_if_rank_lost(self, error: Exception) -> None:
        """End the run in one line if another process has ended: an error here may only be its closed connection.

        Otherwise return after a moment, and the error is this process's own.
        """
        # a process that has closed a connection is about to end, which takes a while
        deadline = time.monotonic() + (GRACE if LOST.search(str(error)) else PERIOD)
        while time.monotonic() < deadline:
            for rank, process in enumerate(self.procs, 1):
                if (
                    process.poll()
                ):  # a process with an error of its own waits before it ends, to be reported by this one
                    self._end(rank)
            time.sleep(PERIOD / 10)

    def close(self, *, failed: bool) -> None:
        """End the started processes and unset the variables, so that this process can start another run."""
        for process in self.procs:
            if failed:
                process.kill()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._has_started:
            for name in VARIABLES:
                os.environ.pop(name, None)
            signals.AT_END.remove(self._kill)
        self.procs.clear()

    def _watch(self) -> None:
        """End all processes when a started one has failed or is stopped for too long; runs in a thread."""
        timers = [StopTimer(process.pid) for process in self.procs]
        while self.procs:
            time.sleep(PERIOD)
            # a killed process (negative status) made the others fail: the lowest status is the cause
            lost = sorted(
                (process.poll(), rank) for rank, process in enumerate(self.procs, 1) if self._is_lost(process)
            )
            if lost:
                status, rank = lost[0]
                if 0 < status not in signals.STATUSES:  # it has reported its error, and this process may be about to
                    time.sleep(GRACE)
                self._end(rank)
            for rank, timer in enumerate(timers, 1):
                if timer.is_too_long():
                    signals.end_process(timer.line(rank), 1)

    def _is_lost(self, process: subprocess.Popen) -> bool:
        """Whether a process has failed.

        One that a signal ended is not lost while this process handles the same signal in its own time.
        """
        status = process.poll()
        if status in signals.STATUSES:
            return not self.is_done and signals.received_signal() is None
        return bool(status) and not self.all_are_done

    def _kill(self) -> None:
        for process in self.procs:
            process.kill()

    def _end(self, rank: int) -> None:
        """End this process, and with it all, in one line about the process of that rank."""
        status = self.procs[rank - 1].poll()
        if status in signals.STATUSES:
            signum = signals.received_signal() or status - 128
            signals.end_process(f"{signals.last_line(signum)} (sent to process {rank} of the run)", status)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        signals.end_process(f"error: process {rank} of the run {how}; all end here", 1)


class StopTimer:
    """A counter of the looks at which another process of this machine was stopped (SIGSTOP) in a row.

    Looks, not seconds: they stop when this process is stopped itself, as a whole job is by a scheduler.

    pid: of the other process
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.looks = pid, 0

    def is_too_long(self) -> bool:
        """Whether it was stopped at so many looks in a row that the grace period is over."""
        self.looks = self.looks + 1 if is_stopped(self.pid) else 0
        return self.looks * PERIOD > signals.grace_period() * signals.MARGIN

    def line(self, rank: int) -> str:
        """The error line about the process of that rank."""
        seconds = f"{signals.grace_period():g} s (trainer.grace_period)"
        return f"error: process {rank} of the run was stopped for {seconds} by a signal; all others end here"


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, on systems that have /proc; False elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] == "T"


@contextmanager
def launched(trainer: L.Trainer) -> Iterator[None]:
    """A context around everything that the processes of a run do together; no process of it is left afterwards.

    On success all processes wait for each other, then the first ends the others. On an error it decides which line to
    print: that of a lost process, of a signal, or the error itself.
    """
    launcher = trainer.strategy.launcher
    own = launcher if isinstance(launcher, RankLauncher) else None
    try:
        yield
        if own:
            own.is_done = True
        if dist.is_initialized():
            trainer.strategy.barrier()
        if own:
            own.all_are_done = True
    except BaseException as error:
        if MARK in os.environ and isinstance(error, signals.Stopped):
            signals.end_process("", error.code)  # before its connections close: the first process sees the status
        if MARK in os.environ and isinstance(error, Exception):
            time.sleep(GRACE / 2)  # the first process reports an error that all have met
        if own:
            if isinstance(error, Exception):
                own.end_if_rank_lost(error)
            own.close(failed=True)
        signum = signals.received_signal()
        memory = isinstance(error, torch.OutOfMemoryError)
        if signum is not None and isinstance(error, RuntimeError) and not memory and trainer.world_size > 1:
            raise signals.Stopped(signum) from None  # another process has ended by the signal, and no longer answers
        if isinstance(error, RuntimeError) and CLOSED.search(str(error)) and trainer.world_size > 1:
            raise TrainingError("another process of the run was lost; all end here, at the last checkpoint") from None
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    if own:
        own.close(failed=False)


def follow_launcher() -> None:
    """End this process as soon as the one that started it has ended, or is stopped for too long."""
    if MARK in os.environ:
        threading.Thread(target=_follow, args=(int(os.environ[MARK]),), daemon=True).start()


def _follow(launcher: int) -> None:
    """Watch the first process, in a thread of another one."""
    timer = StopTimer(launcher)
    while os.getppid() == launcher:
        time.sleep(PERIOD)
        if timer.is_too_long():
            _end_process(timer.line(0))
    _end_process("error: process 0 of the run was lost; all end here")


def _end_process(line: str) -> None:
    """End this process; of those that follow the first, the one of local rank 1 prints the line."""
    if os.environ["LOCAL_RANK"] == "1":
        print(line, file=sys.stderr, flush=True)
    signals.end_process("", 1)
