"""How long commands take to start: python benchmarks/start_up.py [--checkpoint MODEL] [--peer CHECKOUT] [--repetitions 5]

Prints seconds from the command to the end of `train.py --help`, to the line that a mistyped option gets, and to the first
line of the table of the default job, which is printed when the first step is done; with MODEL also to the end of a text of
one token, and to the line with which `serve.py` says that it answers; and the processor seconds until then. Medians, after
one that fills the caches of the files and of the data. CHECKOUT: a folder of another commit, measured in turns.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ONE_STEP = ["trainer.max_steps=1", "trainer.limit_val_batches=0", "callbacks.samples.every_n_steps=null"]
COMMANDS = {  # command, and the first word of the line at which it has started
    "--help": (["train.py", "--help"], None),
    "a mistyped option": (["train.py", "model.n_layr=1"], None),
    "the first step": (["train.py", *ONE_STEP], "1"),
}
OF_MODELS = {
    "a text of one token": (["generate.py", "prompt=x", "generation.max_new_tokens=1"], None),
    "a server": (["serve.py", "port=0"], "try"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    commands = dict(COMMANDS)
    if options.checkpoint:
        model = f"checkpoint={Path(options.checkpoint).resolve()}"
        commands |= {name: ([*words, model], sign) for name, (words, sign) in OF_MODELS.items()}
    roots = [ROOT, *([options.peer.resolve()] if options.peer else [])]
    with tempfile.TemporaryDirectory() as folder:
        for name, (words, sign) in commands.items():
            turns = [[start(root, words, sign, Path(folder)) for root in roots] for _ in range(options.repetitions + 1)]
            for root, measured in zip(roots, zip(*turns[1:], strict=True), strict=True):
                wall, processor = (statistics.median(values) for values in zip(*measured, strict=True))
                whose = "" if root == ROOT else f"   {root.name}"
                print(f"{name:20} {wall:5.2f} s, {processor:5.2f} s of processors{whose}", flush=True)


def start(root: Path, words: list[str], sign: str | None, folder: Path) -> tuple[float, float]:
    """Seconds, and seconds of processors, from a command of a checkout to its line with the sign or, without one, to its end."""
    command = [sys.executable, "-u", str(root / words[0]), *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    began, used = time.perf_counter(), _children()
    with subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            if sign and line.split()[:1] == [sign]:
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
