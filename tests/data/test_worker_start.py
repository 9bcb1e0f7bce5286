"""Processes that load data end with a run that is killed, whatever forked them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT

RUN = """\
import os
import time

from torch.utils.data import DataLoader

from genai_pl.data.worker_pool import map_in_order
from genai_pl.data.worker_start import worker_start


def number(_: object) -> int:
    return os.getpid()


if __name__ == "__main__":
    options = {"num_workers": 1, "worker_init_fn": worker_start(), "multiprocessing_context": "forkserver"}
    rows = iter(DataLoader(range(10_000), collate_fn=number, batch_size=1, **options))
    encoders = map_in_order(number, range(10_000), 1)
    print(next(rows), next(encoders), flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, str(tmp_path / "run.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        workers = [int(word) for word in run.stdout.readline().split()]
        assert len({run.pid, *workers}) == 3
        assert all(map(is_running, workers))
        run.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)
