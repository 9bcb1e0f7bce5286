"""How long the default job takes to a validation loss: python benchmarks/time_to_loss.py TEXT [OVERRIDE ...]

Prints, for every validation of one run on TEXT (last tenth held out), seconds since the command was typed and
nats per byte, and when 1.88 nats was passed: what nanoGPT's CPU configuration states for tiny Shakespeare in about
three minutes (karpathy/nanoGPT, README). Needs nothing but the project.
"""

import csv
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOAL = 1.88


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), f"data.path={sys.argv[1]}", f"hydra.run.dir={run}"]
        command += ["trainer.val_check_interval=25", *sys.argv[2:]]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen: dict[int, float] = {}
        while process.poll() is None:
            report(run / "metrics.csv", time.perf_counter() - start, seen)
            time.sleep(0.2)
        report(run / "metrics.csv", time.perf_counter() - start, seen)
    print(f"whole command: {time.perf_counter() - start:.0f} s, exit status {process.returncode}")


def report(table: Path, seconds: float, seen: dict[int, float]) -> None:
    """Print the validations that have appeared since the last look."""
    if not table.exists():
        return
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/bpb")]
    for row in rows:
        step, nats = int(row["step"]), float(row["val/bpb"]) * math.log(2)
        if step in seen:
            continue
        passed = nats <= GOAL < min(seen.values(), default=math.inf)
        seen[step] = nats
        mark = f"   <- passed {GOAL}" if passed else ""
        print(f"step {step:5d}  {seconds:6.1f} s  {nats:.4f} nats/byte{mark}", flush=True)


if __name__ == "__main__":
    main()
