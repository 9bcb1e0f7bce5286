"""The processes of a run on one machine: started by one command, ended together."""

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

MARK = "GENAI_PL_LAUNCHER"  # names the process id of the first process to those that it starts
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
LOST = re.compile(r"[Cc]onnection (closed|reset)|Broken pipe|peer")  # in what gloo and NCCL raise
PERIOD, GRACE = 0.5, 5.0  # seconds between two looks at the others, and for telling one's own error


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the further processes of this machine by the command it was given; when one is lost, all end."""

    def __init__(self, replaced: _SubprocessScriptLauncher, command: list[str]) -> None:
        super().__init__(replaced.cluster_environment, replaced.num_processes, replaced.num_nodes)
        self.command = command
        self.is_done = False  # whether this process has done its work
        self.all_are_done = False  # whether all have
        self._has_started = False

    def launch(self, function: Callable, *args: object, trainer: L.Trainer | None = None, **kwargs: object) -> object:
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            self._start()
        return function(*args, **kwargs)

    def _start(self) -> None:
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
        """End the run with one line if a process has ended: what this one met is that the other no longer answers."""
        # whoever has closed a connection is about to end, and takes its time
        deadline = time.monotonic() + (GRACE if LOST.search(str(error)) else PERIOD)
        while time.monotonic() < deadline:
            for rank, process in enumerate(self.procs, 1):
                if process.poll():  # those that meet an error themselves wait before they end
                    self._end(rank)
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
            signals.AT_END.remove(self._kill)
        self.procs.clear()

    def _watch(self) -> None:
        """End this process, and with it all others, when one that it started has failed, or is stopped for too long."""
        timers = [StopTimer(process.pid) for process in self.procs]
        while self.procs:
            time.sleep(PERIOD)
            # one that was killed made the others fail
            lost = sorted(
                (process.poll(), rank) for rank, process in enumerate(self.procs, 1) if self._is_lost(process)
            )
            if lost:
                status, rank = lost[0]
                if 0 < status not in signals.STATUSES:  # it has told why, and this process may be about to
                    time.sleep(GRACE)
                self._end(rank)
            for rank, timer in enumerate(timers, 1):
                if timer.is_too_long():
                    signals.end_process(timer.line(rank), 1)

    def _is_lost(self, process: subprocess.Popen) -> bool:
        status = process.poll()
        if status in signals.STATUSES:  # by a signal that this process has its own time for, if it was sent it too
            return not self.is_done and signals.received_signal() is None
        return bool(status) and not self.all_are_done

    def _kill(self) -> None:
        for process in self.procs:
            process.kill()

    def _end(self, rank: int) -> None:
        status = self.procs[rank - 1].poll()
        if status in signals.STATUSES:
            signum = signals.received_signal() or status - 128
            signals.end_process(f"{signals.last_line(signum)} (sent to process {rank} of the run)", status)
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        signals.end_process(f"error: process {rank} of the run {how}; all end here", 1)


class StopTimer:
    """For how long another process of this machine has been stopped (SIGSTOP): counted in looks, which stop with this one."""

    def __init__(self, pid: int) -> None:
        self.pid, self.looks = pid, 0

    def is_too_long(self) -> bool:
        """Whether it was stopped at so many looks in a row that the grace period is over."""
        self.looks = self.looks + 1 if is_stopped(self.pid) else 0
        return self.looks * PERIOD > signals.grace_period() * signals.MARGIN

    def line(self, rank: int) -> str:
        """What to say of it."""
        seconds = f"{signals.grace_period():g} s (trainer.grace_period)"
        return f"error: process {rank} of the run was stopped for {seconds} by a signal; all others end here"


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, on systems that say so in /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] == "T"


@contextmanager
def launched(trainer: L.Trainer) -> Iterator[None]:
    """Around everything that the processes of a run do together: nothing of them is left afterwards."""
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
            signals.end_process("", error.code)  # before its connections end: the first process sees why
        if MARK in os.environ and isinstance(error, Exception):
            time.sleep(GRACE / 2)  # the first process tells what all of them met
        if own:
            if isinstance(error, Exception):
                own.end_if_rank_lost(error)
            own.close(failed=True)
        signum = signals.received_signal()
        memory = isinstance(error, torch.OutOfMemoryError)
        if signum is not None and isinstance(error, RuntimeError) and not memory and trainer.world_size > 1:
            raise signals.Stopped(signum) from None  # another one has ended by it, and no longer answers
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
    timer = StopTimer(launcher)
    while os.getppid() == launcher:
        time.sleep(PERIOD)
        if timer.is_too_long():
            _end_process(timer.line(0))
    _end_process("error: process 0 of the run was lost; all end here")


def _end_process(line: str) -> None:
    """End this process; one of those that follow tells for all."""
    if os.environ["LOCAL_RANK"] == "1":
        print(line, file=sys.stderr, flush=True)
    signals.end_process("", 1)
