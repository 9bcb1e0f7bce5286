"""One side of a comparison in a process of its own, so that neither finds the machine as the other has left it."""

import json
import resource
import subprocess
import sys
from typing import Any


def measured(*side: str, python: str = sys.executable, given: list[str] | None = None) -> Any:
    """What this benchmark prints last, read as JSON, when it is run again with `--side`; the error ends it in one line."""
    given = sys.argv[1:] if given is None else given
    command = [python, "-W", "ignore", sys.argv[0], *given, "--side", *side]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no reason given").splitlines()[-1]
        sys.exit(f"error: {' '.join(side)} failed: {said} (pip install -e '.[dev,bench]' for the peers)")
    return json.loads(done.stdout.strip().splitlines()[-1])


def figures(times: list[float], n: int) -> dict[str, float]:
    """n things from the first of the times (in seconds) to the last, per second; and the peak memory of this process in GiB."""
    return {"rate": n / (times[-1] - times[0]), "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
