"""Shutdown: a server exits within the drain and five seconds, whatever runs."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from tests.conftest import ROOT
from tests.serving.servers import eventually

# each says in a file that it has begun: passes or tokenizers that never end, and slices that are short but very many
STUCK = """
import time
from pathlib import Path
from genai_pl.serving import service
from genai_pl.serving.engine import scoring as slices
def stuck(*arguments):
    Path("begun").touch()
    time.sleep(600)
"""
MANY = """
import time
from pathlib import Path
import torch
from genai_pl.serving.engine import scoring as slices
slices.CPU_TOKENS = 1
def embed(model, rows, head):
    Path("begun").touch()
    time.sleep(0.2)
    return torch.zeros(len(rows), model.config.n_embd)
slices.embed = embed
"""
ASKED = {
    "a pass": (STUCK + "slices.embed = stuck", "/v1/embeddings", {"input": "x"}),
    "a text": (STUCK + "service.encode_prompt = stuck", "/generate", {"prompt": "x"}),
    "many slices": (MANY, "/v1/embeddings", {"input": [[7]] * 256}),
}


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen]]:
    """Processes of the test, killed at its end."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(processes: list, tiny: Path, folder: Path, plugin: str, *options: str) -> tuple[subprocess.Popen, str, Path]:
    """(process, URL, log file) of a server that has imported the plugin."""
    (folder / "plugin_of_the_test.py").write_text(plugin)
    log = folder / "log.txt"
    environment = {
        **os.environ,
        "GENAI_PL_IMPORT": "plugin_of_the_test",
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(ROOT / "serve.py"), f"checkpoint={tiny}", "port=0", "drain=1", *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=environment)
    processes.append(process)
    assert eventually(lambda: "try " in log.read_text() or process.poll() is not None, seconds=90), log.read_text()
    url = re.search(r"http://127.0.0.1:\d+", log.read_text())[0]

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    assert eventually(is_up, seconds=60), log.read_text()
    return process, url, log


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("a pass", "a text")]


@pytest.mark.parametrize("case", ["many slices", *SLOW])
def test_a_server_ends_in_time_whatever_runs(case: str, tiny: Path, tmp_path: Path, processes: list) -> None:
    plugin, path, body = ASKED[case]
    process, url, log = start(processes, tiny, tmp_path, plugin)
    statuses: list[int] = []

    def ask() -> None:
        try:
            statuses.append(httpx.post(f"{url}{path}", json=body, timeout=60).status_code)
        except httpx.HTTPError:
            statuses.append(0)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    assert eventually((tmp_path / "begun").exists)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert time.monotonic() - began < 1 + 5 + 2  # two more for a machine that does much else
    thread.join(30)
    assert statuses[0] in (0, 503)
    if case == "many slices":
        assert statuses == [503]  # it could be told
    assert "Traceback" not in log.read_text()
