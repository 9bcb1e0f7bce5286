"""serve.py started and stopped as by a user: one process, several, and under gunicorn."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.serving.server import bind
from genai_pl.serving.worker import curl
from tests.conftest import ROOT
from tests.serving.servers import eventually, make_service


class Server:
    """A server process and its output."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command,
                cwd=log.parent,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                # a shell ignores it in what it starts in the background, such as these tests
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def printed(self) -> str:
        return self.log.read_text()

    def wait_for(self, url: str, seconds: float = 90) -> str:
        assert eventually(lambda: self.process.poll() is not None or is_ready(url), seconds=seconds), self.printed
        assert self.process.poll() is None, self.printed
        return url

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`start(command, NAME=value)` runs a server in an empty folder; it ends with the test."""
    servers = []

    def go(*command: str, **environment: str) -> Server:
        servers.append(Server(list(command), tmp_path / f"log{len(servers)}.txt", **environment))
        return servers[-1]

    yield go
    for server in servers:
        with suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)  # and the workers of a server that failed
        server.process.wait()


def free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]


SERVE = (sys.executable, str(ROOT / "serve.py"))


def test_a_server_says_what_it_serves_and_finishes_its_streams_when_it_is_stopped(start, tiny: Path) -> None:
    server = start(*SERVE, f"checkpoint={tiny}", "port=0", "slots=3", "generation.max_new_tokens=100")
    assert eventually(lambda: "try " in server.printed or server.process.poll() is not None, seconds=90), server.printed
    url = server.wait_for(re.search(r"http://127.0.0.1:\d+", server.printed)[0])
    for line in ("tiny, a language model", "128 tokens", "3 answers at once", "none", f"curl {url}/generate"):
        assert line in server.printed
    words = re.search(r"-d '(.*)'", server.printed)[1]
    assert httpx.post(f"{url}/generate", json=json.loads(words)).status_code == 200
    body = {"prompt": "x", "stream": True, "max_new_tokens": 100, "temperature": 2}
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.printed
    assert re.search(r"stopped     after [3-9]\d* requests\n$", server.printed), server.printed


def test_after_ctrl_c_the_last_line_tells_how_many_requests_there_were(start, tiny: Path) -> None:
    server = start(*SERVE, f"checkpoint={tiny}", "port=0")
    assert eventually(lambda: "try " in server.printed or server.process.poll() is not None, seconds=90), server.printed
    assert httpx.get(re.search(r"http://127.0.0.1:\d+", server.printed)[0] + "/health").status_code == 200
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 130
    assert server.printed.splitlines()[-1] == "stopped     after 1 request"


@pytest.mark.slow
def test_workers_share_a_port_and_their_numbers_and_a_dead_one_is_replaced(start, tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    server = start(*SERVE, f"checkpoint={tiny}", f"port={port}", "workers=2", "cache=null", TMPDIR=str(tmp_path))
    url = server.wait_for(f"http://127.0.0.1:{port}")
    body = {"prompt": "x", "max_new_tokens": 1}

    def ask(n: int) -> None:
        for _ in range(n):  # a new connection each time: either worker may take it
            # patient: the one that starts anew takes the processor meanwhile
            assert httpx.post(f"{url}/generate", json=body, timeout=60).status_code == 200

    def counted() -> float:
        return sum(
            float(value) for value in re.findall(r'requests_total{route="/generate",status="200"} (\S+)', numbers(url))
        )

    ask(20)
    assert counted() == 20
    assert counted() == 20  # whichever worker answers
    children = [
        int(pid) for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    ]
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert eventually(lambda: not Path(f"/proc/{workers[0]}").exists(), seconds=30)
    ask(5)
    assert counted() == 25
    assert server.printed.count("serving     tiny") == 1
    assert server.stop() == 0
    assert int(re.search(r"stopped     after (\d+) requests\n$", server.printed)[1]) >= 25
    assert not list(tmp_path.glob("genai_pl-metrics-*"))


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(start, tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    server = start(*SERVE, f"checkpoint={tiny}", f"port={port}", "workers=2", TMPDIR=str(tmp_path))
    url = server.wait_for(f"http://127.0.0.1:{port}")
    server.process.kill()
    assert eventually(lambda: not is_ready(url), seconds=60)  # or they would serve on, and hold the port


def numbers(url: str) -> str:
    return httpx.get(f"{url}/metrics").text


@pytest.mark.slow
def test_gunicorn_runs_it_with_the_shipped_configuration(start, tiny: Path) -> None:
    pytest.importorskip("gunicorn", reason="needs pip install gunicorn uvicorn-worker")
    pytest.importorskip("uvicorn_worker", reason="needs pip install gunicorn uvicorn-worker")
    port = free_port()
    settings = json.dumps({"checkpoint": str(tiny), "port": port, "workers": 2})
    command = (sys.executable, "-m", "gunicorn", "-c", str(ROOT / "deploy" / "gunicorn.conf.py"))
    server = start(*command, GENAI_PL_SERVE=settings)
    url = server.wait_for(f"http://127.0.0.1:{port}")
    assert httpx.post(f"{url}/generate", json={"prompt": "x", "max_new_tokens": 2}).status_code == 200
    assert "genai_pl_generated_tokens_total 2.0" in numbers(url)
    assert server.stop() == 0


@pytest.mark.slow
def test_a_worker_that_cannot_load_its_model_ends_the_server_in_one_line(start, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    server = start(*SERVE, "checkpoint=broken", f"port={free_port()}", "workers=2")
    assert server.process.wait(90) == 1
    assert server.printed.count("error: ") == 1
    assert "Traceback" not in server.printed


MISTAKES = {
    "checkpoint=nowhere": "checkpoint=nowhere: no such run folder",
    "checkpoint=tiny adapter=nothing": "adapter=nothing: no adapter_config.json",
    "checkpoint=tiny api_keys=none.txt": "api_keys=none.txt: cannot be read",
    "checkpoint=tiny cache=disk": "cache=disk is not null, memory or redis://",
    "checkpoint=tiny dtype=fp64": "dtype=fp64 is not one of fp32, bf16, fp16",
    "checkpoint=tiny dtype=int8 adapter=nothing": "dtype=int8 takes no adapter: merge it first",
    "checkpoint=tiny dtype=int4 adapter=nothing": "dtype=int4 takes no adapter: merge it first",
    "checkpoint=tiny host=256.0.0.1": "host=256.0.0.1",
    "checkpoint=tiny timeout=0": "timeout=0",
    "checkpoint=tiny pooling=max": "pooling=max is not one of mean, last, cls",
    "checkpoint=tiny device=tpu9": "device=tpu9",
    "checkpoint=tiny host=": "host is empty",
    "checkpoint=tiny prefix_cache_mib=inf": "prefix_cache_mib=inf must be a finite number",
    "checkpoint=tiny prefix_cache_mib=1e12": "prefix_cache_mib=1e+12: cpu has",
    "checkpoint=tiny drain=inf": "drain=inf must be a finite number",
    "checkpoint=tiny cache_mib=nan": "cache_mib=nan must be a finite number",
    "checkpoint=tiny adapter={a:null}": "adapter: a names no folder; write adapter={a:FOLDER}",
    "checkpoint=tiny adapter={a:[x]}": "adapter: a names no folder",
    "checkpoint=tiny adapter={1:nothing}": "adapter=nothing: no adapter_config.json",
    "checkpoint=tiny generation=beam": "serving draws one token at a time; leave out num_beams",
    "checkpoint=tiny generation.temperature=-1": "generation.temperature=-1",
    "checkpoint=tiny generation.logit_bias={99999:1}": "generation.logit_bias: token 99999 is not one",
    "checkpoint=tiny generation.json_schema=none.json": "none.json",
    "checkpoint=text.txt": "refused, it is no file of torch.save's zip format",
    "checkpoint=tiny --port 80": "--port: options are written name=value: port=80",
    "--max-tokens=5 checkpoint=tiny": "--max-tokens: options are written name=value: max_tokens=5",
    "backend=openai url=http://": "names no host: write http://HOST:PORT/v1",
    "backend=openai": "backend=openai needs url=",
    "prt=1": "did you mean port?",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, command, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "text.txt").write_text("Once upon a time")
    result = command("serve", "port=0", *mistake.split())
    assert result.status in (1, 2)
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert MISTAKES[mistake] in result.err


def test_the_command_to_try_has_a_place_for_a_key_where_one_is_asked_for(tiny: Path) -> None:
    service = make_service(tiny)
    assert " -H 'Authorization: Bearer KEY' " in curl(service, "http://host:1", asks_for_key=True)
    assert "KEY" not in curl(service, "http://host:1", asks_for_key=False)


def test_a_port_that_is_taken_is_one_line(command, tiny: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        result = command("serve", f"checkpoint={tiny}", f"port={port}")
    assert result.status == 2
    assert (
        result.err == f"error: port={port}: another program listens there on 127.0.0.1; choose another, or 0 for any\n"
    )


def test_a_missing_library_is_one_line(command, monkeypatch: pytest.MonkeyPatch) -> None:
    import genai_pl.cli.serve

    monkeypatch.setattr(genai_pl.cli.serve, "find_spec", lambda name: None)
    result = command("serve", "checkpoint=tiny")
    assert result.status == 2
    assert result.err == "error: serve needs fastapi, uvicorn, prometheus_client, httpx: pip install -e '.[serve]'\n"


def test_adapters_are_called_by_their_folders_or_as_they_are_named() -> None:
    from genai_pl.cli.serve import name_adapters
    from genai_pl.errors import ConfigError

    assert name_adapters(None) == {}
    assert name_adapters("runs/polite/adapter") == {"polite": "runs/polite/adapter"}
    assert name_adapters(["a/x", "b/y"]) == {"x": "a/x", "y": "b/y"}
    assert name_adapters({"mine": "a/x"}) == {"mine": "a/x"}
    with pytest.raises(ConfigError, match="two are called x"):
        name_adapters(["a/x", "b/x"])
