#!/usr/bin/env bash
# torch 2.13.0, DataLoader(num_workers=2) with multiprocessing's "forkserver", which is the default on Linux from Python 3.14 on:
# when the training process is killed (SIGKILL, as by the kernel for lack of memory, or by a scheduler), its workers stay for
# ever, with their memory and every pipe that they have inherited, so that whoever reads the run's output waits as well. Under
# "fork" and "spawn" they end within seconds. A worker of torch looks every 5 s whether the number of its parent has changed; a
# forkserver's child has the server as parent, and the server ends when all ends of a pipe are closed, of which each of its
# children holds one (CPython passes it on, so that children can use the same server): each waits for the other.
# Nothing leaks where the run ends by itself. A thread in the worker (worker_init_fn) that joins
# multiprocessing.parent_process(), which is the training process in all three, ends it at once.
# Seen with Python 3.11: fork 0 workers left after 60 s (gone after 5), spawn 0 (6), forkserver 2; with the thread 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$work/run.py" <<'PY'
import multiprocessing
import os
import sys
import threading
import time

from torch.utils.data import DataLoader


def end_with_run(worker: int) -> None:
    run = multiprocessing.parent_process()
    threading.Thread(target=lambda: (run.join(), os._exit(1)), daemon=True).start()


if __name__ == "__main__":
    method, start = sys.argv[1], end_with_run if "thread" in sys.argv else None
    batches = iter(DataLoader(range(1000), num_workers=2, multiprocessing_context=method, worker_init_fn=start))
    next(batches)
    print(*[worker.pid for worker in batches._workers], flush=True)
    time.sleep(600)
PY
cat > "$work/kill.py" <<'PY'
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


left = {}
for options in (["fork"], ["spawn"], ["forkserver"], ["forkserver", "thread"]):
    command = [sys.executable, str(Path(__file__).with_name("run.py")), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        workers = [int(pid) for pid in run.stdout.readline().split()]
        run.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    running = [pid for pid in workers if is_running(pid)]
    left[" ".join(options)] = len(running)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
print(f"workers left 60 s after SIGKILL: {left}")
assert left["forkserver"] == 2 and left["forkserver thread"] == 0  # those of fork and spawn: a busy machine may need longer
PY
"$work/venv/bin/python" "$work/kill.py"
