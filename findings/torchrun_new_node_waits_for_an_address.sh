#!/usr/bin/env bash
# torch 2.13.0 (2.15.0 has the same lines): a node of torchrun that is lost can be replaced only if TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# is set everywhere. By default the agent of rank 0 publishes the address of the workers' store in the first round of the meeting
# alone: it keeps what it built then (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py, next_rendezvous). In a later round
# the agents that were there go by that, and one that is new waits 60 seconds for an address under the number of its round, which nobody
# writes. Then both end with DistStoreError, however many restarts are left. So an elastic run survives a lost process, and
# a node that leaves (--nnodes 1:2), but no node can come in.
# Seen: default "wait timeout after 60000ms, keys: /torch.rendezvous.x.1/MASTER_ADDR", status 1; with the variable both end with 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$work"
cat > worker.py <<'PY'
import os
import time

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
print("round of", dist.get_world_size(), "with restart", os.environ["TORCHELASTIC_RESTART_COUNT"], flush=True)
for n in range(30 if os.path.exists("lost") else 10_000):
    dist.all_reduce(torch.ones(1))  # fails in one process where the other is lost
    time.sleep(0.1)
PY
cat > meet.py <<'PY'
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def agent(name, port):
    meeting = [
        "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=x", "--local-addr=127.0.0.1",
        f"--rdzv-conf=is_host={name == 'first'},join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=3",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=5"]
    log = open(f"{name}.log", "w")
    return subprocess.Popen([*command, *meeting, "worker.py"], stdout=log, stderr=log, start_new_session=True)


def run(shares):
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(not shares))
    Path("lost").unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = agent("first", port), agent("second", port)
    while "round of 2" not in Path("first.log").read_text():
        assert first.poll() is None, Path("first.log").read_text()
        time.sleep(0.2)
    worker = subprocess.run(["pgrep", "-P", str(second.pid)], capture_output=True, text=True).stdout.split()
    for pid in (second.pid, *map(int, worker)):  # a power cut
        os.kill(pid, signal.SIGKILL)
    second.wait()
    Path("lost").touch()
    time.sleep(6)  # three keep-alives: the meeting has forgotten it
    again = agent("again", port)
    try:
        return [one.wait(timeout=240) for one in (again, first)], Path("again.log").read_text()
    finally:
        for one in (again, first):
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)


shared, told = run(shares=True)
print("store shared (the default):", shared, "MASTER_ADDR" in told)
apart, _ = run(shares=False)
print("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1:", apart)
assert shared == [1, 1] and "wait timeout" in told and "MASTER_ADDR" in told
assert apart == [0, 0]
PY
OMP_NUM_THREADS=1 "$work/venv/bin/python" meet.py
echo "as found"
