"""Runs of train.py that are killed at a chosen moment, and how they end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT
from tests.training.forked_runs import Moment


class Ended(NamedTuple):
    """The end of a run: its exit status, its output, how many of its processes are left, and its seconds."""

    status: int
    out: str
    left: int
    seconds: float
    counts: dict[int, dict[str, int]]  # by rank: how often each stage had a moment


class Killer:
    """The process whose children are the runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.n = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forked_runs"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self,
        folder: Path,
        *arguments: str,
        moment: Moment | None = None,
        seconds: float | None = None,
        rank: int = 0,
        counts: bool = False,
    ) -> Ended:
        """How train.py with the arguments ends in the folder, where it has a cache of its own, if it is killed then.

        counts: count the moments of its stages
        """
        self.n += 1
        output = self.folder / f"output-{self.n}.txt"
        folder.mkdir(exist_ok=True)
        job = {"arguments": arguments, "folder": str(folder), "output": str(output), "counts": counts}
        self.process.stdin.write(json.dumps({**job, "moment": moment, "seconds": seconds, "rank": rank}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        counts = {
            int(path.suffixes[-2][1:]): json.loads(path.read_text())
            for path in self.folder.glob(f"{output.name}.*.json")
        }
        return Ended(**answer, out=output.read_text(), counts=counts)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
