"""Runs of train.py as children of one process that has imported everything, each killed at the moment that is chosen for it.

`python -m tests.training.forked_runs` reads one job a line as JSON and answers with how its run ended. A moment is the n-th
line of our own code that is executed in a stage of the run (STAGES), or the n-th file that is flushed, which is cut in its
middle (TORN).
"""

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from tests.conftest import ROOT

TORN = "torn"
# the function that a stage of a run lies in, by its file; within one, another may begin
STAGES = {
    ("train.py", "_train"): "command",
    ("build.py", "build"): "preparation",
    ("train.py", "_open_run_folder"): "beginning",
    ("fit.py", "fit"): "training",
    ("base.py", "validation_step"): "validation",
    ("rollout_module.py", "validation_step"): "validation",
    ("checkpoint.py", "save"): "checkpoint",
    ("metrics_csv.py", "log_metrics"): "table",
    ("rollout.py", "generate_rollout"): "rollout",
    ("episodes.py", "play_episodes"): "rollout",
    ("samples.py", "_show_continuations"): "samples",
    ("fit.py", "finish"): "finish",
    ("fit.py", "export_run"): "export",
}
PACKAGE = str(ROOT / "genai_pl") + os.sep
PR_SET_CHILD_SUBREAPER = 36
PATIENCE = 40.0  # seconds that the other processes of a run have after the one that was killed


class Moment(NamedTuple):
    """When a process of a run ends itself by SIGKILL."""

    stage: str
    n: int
    rank: int = 0


class Tracer:
    """Counts the moments of each stage, and kills this process at the one that was chosen."""

    def __init__(self, moment: Moment | None) -> None:
        self.moment, self.counts, self.stages = moment, Counter(), []

    def start(self) -> None:
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                self.count(TORN, f"/proc/self/fd/{descriptor}")
            flush(descriptor)

        os.fsync = fsync
        sys.settrace(self._called)

    def count(self, stage: str, file: str | None = None) -> None:
        self.counts[stage] += 1
        if self.moment and (stage, self.counts[stage]) == self.moment[:2]:
            if file:
                os.truncate(file, os.stat(file).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def _called(self, frame: FrameType, event: str, _: object) -> Callable | None:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        stage = STAGES.get((name.rpartition(os.sep)[2], frame.f_code.co_name))
        if stage is None:
            return self._inside
        self.stages.append(stage)
        return self._first

    def _inside(self, frame: FrameType, event: str, _: object) -> Callable:
        if event == "line" and self.stages:
            self.count(self.stages[-1])
        return self._inside

    def _first(self, frame: FrameType, event: str, _: object) -> Callable:
        self._inside(frame, event, None)
        if event == "return":
            self.stages.pop()
        return self._first


def serve() -> None:
    """Run the jobs of standard input, one after the other."""
    import datasets  # noqa: F401
    import tensorboard  # noqa: F401
    import transformers  # noqa: F401

    import train  # noqa: F401

    for name in ("training.train", "cli.dry_run", "exporting"):
        __import__(f"genai_pl.{name}")
    for module in (ROOT / "genai_pl" / "modules").glob("[a-z]*.py"):
        __import__(f"genai_pl.modules.{module.stem}")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # who loses its parent is a child of this process
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        pid = os.fork()
        if not pid:
            _be_run(job)
        status = _wait(pid, job["seconds"], job["rank"])
        leftovers = _end_all()
        seconds = time.monotonic() - began
        print(json.dumps({"status": status, "left": leftovers, "seconds": seconds}), flush=True)


def _wait(pid: int, seconds: float | None, rank: int) -> int:
    """The exit status of the process, one of whose run is killed after this many seconds."""
    deadline = time.monotonic() + (seconds or float("inf"))
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for process in [pid, *_children(pid)][rank : rank + 1]:
                os.kill(process, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)


def _end_all() -> int:
    """How many processes of a run are there still when they should have ended."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return 0
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    children = _children(os.getpid())
    for process in children:
        os.kill(process, signal.SIGKILL)
    return len(children)


def _children(pid: int) -> list[int]:
    return sorted(
        int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
    )


def _be_run(job: dict) -> NoReturn:
    """Be the first process of the run, from whose beginnings the others are forked."""
    os.setsid()
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(job["folder"], "cache")
    devices = next((int(a.partition("=")[2]) for a in job["arguments"] if a.startswith("trainer.devices=")), 1)
    waiting = [_fork_rank(job) for _ in range(1, devices)]

    class Popen(subprocess.Popen):
        """A process of train.py is one that waits for its command line already."""

        def _execute_child(self, args: list[str], *rest: object) -> None:
            if not any(str(argument).endswith("train.py") for argument in args):
                super()._execute_child(args, *rest)
                return
            self.pid, pipe = waiting.pop(0)
            words = args[next(n for n, argument in enumerate(args) if str(argument).endswith("train.py")) :]
            os.write(pipe, json.dumps({"arguments": words, "environment": dict(rest[5])}).encode())
            os.close(pipe)

    subprocess.Popen = Popen
    _train(job, ["train.py", *job["arguments"]], rank=0)


def _fork_rank(job: dict) -> tuple[int, int]:
    """A process that becomes one of the run when it is told its command line, and where to tell it."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(write_end)
        with os.fdopen(read_end) as file:
            _be_rank(job, file.read())
    os.close(read_end)
    return pid, write_end


def _be_rank(job: dict, command: str) -> NoReturn:
    """Be a further process of the run, unless there is none."""
    if not command:
        os._exit(0)
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    values = json.loads(command)
    os.environ.clear()
    os.environ.update(values["environment"])
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # Lightning asks when it is imported
    _train(job, values["arguments"], rank=rank_zero_only.rank)


def _train(job: dict, argv: list[str], *, rank: int) -> NoReturn:
    import train

    sys.argv, status = argv, 0
    moment = Moment(*job["moment"]) if job["moment"] else None
    tracer = Tracer(moment if moment and moment.rank == rank else None)
    if moment or job["counts"]:  # tracing takes as long as the run itself
        tracer.start()
    try:
        train.main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.settrace(None)
    sys.stdout.flush()
    sys.stderr.flush()
    Path(f"{job['output']}.{rank}.json").write_text(json.dumps(tracer.counts))
    os._exit(status)


if __name__ == "__main__":
    serve()
