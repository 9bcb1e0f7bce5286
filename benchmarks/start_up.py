"""How long commands take to start: python benchmarks/start_up.py [REPETITIONS]

Prints seconds from the command to the end of `train.py --help`, to the line that a mistyped option gets, and to the first
line of the table of the default job, which is printed when the first step is done; and the processor seconds until then.
Medians of REPETITIONS (5), after one that fills the caches of the files and of the data. Needs nothing but the project.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "--help": ["--help"],
    "a mistyped option": ["model.n_layr=1"],
    "the first step": ["trainer.max_steps=1", "trainer.limit_val_batches=0", "callbacks.samples.every_n_steps=null"],
}


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in COMMANDS.items():
            measured = [start(arguments, Path(folder)) for _ in range(repetitions + 1)][1:]
            wall, processor = (statistics.median(values) for values in zip(*measured, strict=True))
            print(f"{name:18} {wall:5.2f} s, {processor:5.2f} s of processors", flush=True)


def start(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of processors, from the command to its first step or, without one, to its end."""
    command = [sys.executable, "-u", str(ROOT / "train.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    began, used = time.perf_counter(), _children()
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            if line.split()[:1] == ["1"]:
                seconds = time.perf_counter() - began
                processor = _processor_seconds(process.pid)
                process.kill()  # what follows is no start
                return seconds, processor
    return time.perf_counter() - began, _children() - used


def _children() -> float:
    """Processor seconds of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _processor_seconds(pid: int) -> float:
    """Processor seconds of a running process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
