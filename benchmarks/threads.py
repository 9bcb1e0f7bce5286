"""How threads should wait for each other: python benchmarks/threads.py [--spins 0 1000 10000] [--steps 30]

A step of the default job in milliseconds (median of the printed rows) by GOMP_SPINCOUNT, the number of times that a thread of
libgomp looks again before it sleeps: alone, beside one and two processes that keep a core busy, and beside a second
training that waits in the same way. `start` is what the commands choose by themselves. `--turns` repeats all of it.
"""

import argparse
import contextlib
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUSY = [sys.executable, "-c", "while True: pass"]
JOB = (
    "trainer.log_every_n_steps=5",
    "trainer.limit_val_batches=0",
    "callbacks.samples.every_n_steps=null",
    "logger=csv",
)
JOB += ("callbacks.export=false", "trainer.accelerator=cpu")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", nargs="+", default=["start", "0", "1000", "10000", "100000"])
    parser.add_argument("--beside", nargs="+", default=["nothing", "one", "two", "training"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("options", nargs="*", help="more options of train.py, after --")
    return parser.parse_args()


def training(folder: Path, spins: str, steps: int, options: list[str]) -> subprocess.Popen:
    """The default job in a process of its own, with its files in `folder`."""
    variables = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if spins != "start":
        variables["GOMP_SPINCOUNT"] = spins
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *JOB,
        f"trainer.max_steps={steps}",
        f"output_dir={folder}",
        *options,
    ]
    return subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def beside(what: str, folder: Path, spins: str, options: list[str]) -> Iterator[None]:
    """Context in which the machine has other work to do."""
    others = [subprocess.Popen(BUSY) for _ in range({"one": 1, "two": 2}.get(what, 0))]
    if what == "training":
        others.append(training(folder, spins, 10**6, options))
        metrics = folder / "metrics.csv"
        while not (metrics.exists() and metrics.stat().st_size):  # until it makes steps
            time.sleep(0.2)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def step_ms(folder: Path, tokens: int) -> float:
    """Median milliseconds of a step, the first two rows left out."""
    with (folder / "metrics.csv").open() as file:
        rates = [float(row["train/tokens_per_sec"]) for row in csv.DictReader(file) if row["train/tokens_per_sec"]]
    return 1000 * tokens / statistics.median(rates[2:])


def main() -> None:
    args = parse()
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.turns):
        for what in args.beside:
            for spins in args.spins:
                with tempfile.TemporaryDirectory() as folder, beside(what, Path(folder, "other"), spins, args.options):
                    job = training(Path(folder, "run"), spins, args.steps, args.options)
                    if job.wait():
                        sys.exit("error: the default job failed: run python train.py to see why")
                    times.setdefault((what, spins), []).append(step_ms(Path(folder, "run"), 2048))
                print(f"beside {what:9} spins {spins:>7}: {times[what, spins][-1]:7.0f} ms a step", flush=True)
    print("medians".ljust(20) + "".join(f"{spins:>10}" for spins in args.spins))
    for what in args.beside:
        cells = (statistics.median(times[what, spins]) for spins in args.spins)
        print(f"beside {what:13}" + "".join(f"{ms:10.0f}" for ms in cells))


if __name__ == "__main__":
    main()
