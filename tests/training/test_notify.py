"""The notice of a run's end: what a web address is told, and that nothing there can fail a run."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from genai_pl.training.notify import post
from tests.conftest import TINY

RUN = (*TINY, "data.path=text.txt", "callbacks.export=false", "precision=fp32", "logger=csv")


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted; the path says how it answers."""

    def do_POST(self) -> None:
        received = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.headers["Content-Type"], received))
        if self.path == "/slow":
            self.server.waiting.wait(10)
        self.send_response(500 if self.path == "/broken" else 204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hook() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Hook)
    server.received, server.waiting = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.waiting.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def train(command, tmp_path: Path):
    Path("text.txt").write_text("One and two are three. " * 99)
    return lambda *arguments, run="run": command("train", *RUN, f"hydra.run.dir={run}", *arguments)


def test_a_finished_run_tells_its_steps_and_metrics(train, hook: HTTPServer) -> None:
    result = train(f"callbacks.notify.url={hook.url}/here")
    assert result.status == 0, result.err
    ((kind, told),) = hook.received
    assert kind == "application/json"
    assert Path(told.pop("run")).name == "run"
    metrics = told.pop("metrics")
    assert {"train/loss", "train/lr", "val/loss", "train/tokens_seen"} <= metrics.keys()
    assert metrics["val/loss"] == json.loads(Path("run/results.json").read_text())["val/loss"]
    text = told.pop("text")
    assert text.endswith(f"run finished at step 4 of 4, val/loss {metrics['val/loss']:.4f}")
    assert told == {"state": "finished", "steps": 4, "total_steps": 4, "error": None}


def test_a_run_that_fails_tells_the_line_that_is_printed(train, hook: HTTPServer) -> None:
    result = train(f"callbacks.notify.url={hook.url}/here", "optimizer=sgd", "optimizer.lr=1e30")
    assert result.status == 1
    ((_, told),) = hook.received
    assert told["state"] == "failed"
    assert 0 < told["steps"] < 4
    assert result.err.splitlines()[-1] == f"error: {told['error']}"
    # and one that does not come to its first step
    Path("text.txt").write_text("")
    train(f"callbacks.notify.url={hook.url}/here", run="other")
    assert (hook.received[1][1]["state"], hook.received[1][1]["steps"]) == ("failed", 0)


@pytest.mark.parametrize("path", ["broken", "slow", "refused"])
def test_an_address_that_fails_costs_a_line(path: str, train, hook: HTTPServer) -> None:
    url = "http://127.0.0.1:9" if path == "refused" else hook.url
    result = train(f"callbacks.notify.url={url}/{path}", "callbacks.notify.timeout=0.3")
    assert result.status == 0
    (line,) = [line for line in (result.out + result.err).splitlines() if line.startswith("notify ")]
    reason = {"broken": "500 Internal Server Error", "slow": "no answer within 0.3 s", "refused": "refused"}[path]
    assert "127.0.0.1 was not told of the end: " in line
    assert reason in line
    assert path == "refused" or f"/{path}" not in line  # the path may be a secret


def test_a_server_that_answers_in_drops_is_left_at_the_time_limit(hook: HTTPServer) -> None:
    start = time.monotonic()
    post(f"{hook.url}/slow", {}, timeout=0.2)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("url", ["ftp://host/x", "host/x", "file:///etc/passwd", "http://"])
def test_what_is_no_address_is_refused_before_the_data_are_read(url: str, train) -> None:
    result = train(f"callbacks.notify.url={url}", "data.path=nowhere.txt")
    assert result.status == 2
    assert result.err == f"error: callbacks.notify.url={url}: expected an address, such as https://HOST/PATH\n"


def test_the_bell_rings_on_a_terminal_alone(train, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        text, tty = "", True

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            """Nothing is held back."""

        def isatty(self) -> bool:
            return self.tty

    terminal = Terminal()
    monkeypatch.setattr("sys.__stderr__", terminal)
    assert train("callbacks.notify.bell=true").status == 0
    assert terminal.text == "\a"
    terminal.tty = False
    assert train("callbacks.notify.bell=true", run="other").status == 0
    assert terminal.text == "\a"
