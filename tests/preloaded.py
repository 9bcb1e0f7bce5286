"""Commands in processes of their own that start in milliseconds: forks of one process that has imported everything.

A fork behaves as `python train.py` does, with a command line, environment, folder, output and signals of its own. So do
the further processes of a run, which it starts with `subprocess.Popen`: one that waits takes the place of a new one.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

from tests.conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.preload"])


class Command:
    """A train.py that runs: what tests use of `subprocess.Popen`, with both outputs in one pipe.

    n_others: further processes of the run on this machine, beside the first
    """

    def __init__(self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], n_others: int) -> None:
        # the server imports what its environment names, on one thread
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with mock.patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}):
            multiprocessing.forkserver.ensure_running()
        reading, writing = SERVER.Pipe(duplex=False)
        job = (writing, ["train.py", *arguments], str(folder), dict(environment), n_others)
        self._process = SERVER.Process(target=be_command, args=job)
        self._process.start()
        writing.close()
        self.pid = self._process.pid
        self.stdout = os.fdopen(os.dup(reading.fileno()), encoding="utf-8")
        reading.close()

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """`returncode`, as a method."""
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """The rest of the output, once all that could write to it have ended; TimeoutExpired if they have not."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self.stdout.read()), daemon=True)
        reader.start()
        reader.join(timeout)
        if not said:
            raise subprocess.TimeoutExpired("train.py", timeout)
        self._process.join()
        self.stdout.close()
        return said[0], None


def be_command(output: Connection, argv: list[str], folder: str, environment: dict[str, str], n_others: int) -> None:
    """Be the first process of a run."""
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    os.chdir(folder)
    take_environment(environment)
    command = start_waiting(n_others)  # returns in each of the further processes, too
    if command is not None:
        argv = be_rank(json.loads(command))
    import train

    sys.argv = argv
    train.main()


def start_waiting(n: int) -> str | None:
    """Fork n processes that wait, each to become the next train.py that this one starts.

    Returns None in this process, and in one of the others what it was told to become.
    """
    waiting: list[tuple[int, int]] = []  # the process, and where its command line is written
    for _ in range(n):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            for descriptor in (writing, *(pipe for _, pipe in waiting)):
                os.close(descriptor)
            with os.fdopen(reading) as file:
                return file.read() or os._exit(0)  # nothing, if it is not needed
        os.close(reading)
        waiting.append((pid, writing))

    class Popen(subprocess.Popen):
        """A process of train.py is one that waits for its command line already."""

        def _execute_child(self, args: list[str], *rest: object) -> None:
            start = next((n for n, argument in enumerate(args) if str(argument).endswith("train.py")), None)
            if start is None or not waiting:
                super()._execute_child(args, *rest)
                return
            self.pid, pipe = waiting.pop(0)
            os.write(pipe, json.dumps({"argv": args[start:], "environment": rest[5]}).encode())
            os.close(pipe)

    subprocess.Popen = Popen
    return None


def be_rank(told: dict) -> list[str]:
    """Be a further process of the run; its argv."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    take_environment(told["environment"])
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # Lightning asks when it is imported
    return told["argv"]


def take_environment(environment: dict[str, str]) -> None:
    """Have these variables and no others; what PYTHONPATH names is searched first."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
