"""Prometheus metrics, and that the Grafana dashboard queries series that exist."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.serving.metrics import Metrics, forget_dead
from genai_pl.serving.server import bind
from tests.conftest import ROOT
from tests.serving.servers import eventually

DEPLOY = ROOT / "deploy"
PROMETHEUS = shutil.which("prometheus", path="/usr/bin:/usr/local/bin")


def families(text: str) -> dict[str, float]:
    """The value of every series."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_tokens_of_the_prefix_cache_are_counted_for_the_client_and_for_prometheus(client) -> None:
    before = families(client.get("/metrics").text)
    body = {"model": "tiny", "prompt": "A beginning of forty characters in all..", "n": 2}
    # another length each time, as the cache of answers would not read the prompt at all
    usages = [client.post("/v1/completions", json={**body, "max_tokens": n}).json()["usage"] for n in (3, 4)]
    assert usages[0]["prompt_tokens_details"]["cached_tokens"] == 0
    assert usages[1]["prompt_tokens_details"]["cached_tokens"] == 32
    after = families(client.get("/metrics").text)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown['genai_pl_prefix_lookups_total{"result": "hit"}'] >= 2
    assert grown["genai_pl_prefix_tokens_total{}"] >= 64
    assert after["genai_pl_prefix_cache_bytes{}"] > 0


def test_every_request_and_token_is_counted(client) -> None:
    before = families(client.get("/metrics").text)
    body = {"prompt": "Once", "max_new_tokens": 7, "temperature": 1, "repetition_penalty": 1.01}
    for _ in range(3):
        client.post("/generate", json=body)
    client.post("/generate", json={})
    client.get("/nowhere/at/all")
    after = families(client.get("/metrics").text)

    def more(name: str, **labels: str) -> float:
        key = f"genai_pl_{name}{json.dumps(labels, sort_keys=True)}"
        return after.get(key, 0.0) - before.get(key, 0.0)

    assert more("requests_total", route="/generate", status="200") == 3
    assert more("requests_total", route="/generate", status="422") == 1
    assert more("requests_total", route="other", status="404") == 1
    assert more("prompt_tokens_total") == 12
    n_generated = more("generated_tokens_total")
    assert 3 <= n_generated <= 21
    assert more("first_token_seconds_count") == 3
    assert more("inter_token_seconds_count") == n_generated - 3
    assert more("request_seconds_count", route="/generate") == 4
    assert more("batch_size_count") >= 1
    assert after['genai_pl_memory_bytes{"kind": "resident"}'] > 2**20
    assert after["genai_pl_queue_running{}"] == after["genai_pl_queue_waiting{}"] == 0


def test_what_is_refused_before_its_route_is_counted_under_it(tiny: Path) -> None:
    from tests.serving.servers import make_service, serving

    refused = [
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/responses/resp_1"),
        ("GET", "/nowhere"),
        ("PUT", "/generate"),
    ]
    with serving(make_service(tiny), keys=("right",)) as client:
        for method, path in refused:
            assert client.request(method, path, json={}).status_code == 401
        counted = families(client.get("/metrics").text)
    routes = ["/v1/chat/completions", "/v1/responses/{name}", "other"]
    labels = [json.dumps({"route": route, "status": "401"}, sort_keys=True) for route in routes]
    assert [counted[f"genai_pl_requests_total{label}"] for label in labels] == [1, 1, 2]


def test_the_dashboard_asks_for_what_there_is(client) -> None:
    client.post("/generate", json={"prompt": "Once", "max_new_tokens": 2})
    there = {key.split("{")[0] for key in families(client.get("/metrics").text)}
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    names = {name for expression in expressions for name in re.findall(r"genai_pl_\w+", expression)}
    assert len(expressions) > 10
    assert names <= there
    declared = {family.name for family in Metrics().registry.collect()}
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names}
    assert shown == declared


def test_files_of_the_deployment_can_be_read_and_name_each_other() -> None:
    import yaml

    files = {
        path.name: yaml.safe_load(path.read_text())
        for path in DEPLOY.rglob("*.y*ml")
        if path.parent.name != "kubernetes"
    }
    services = files["compose.yaml"]["services"]
    for service in services.values():
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (DEPLOY / volume.split(":")[0]).exists(), volume
    [job] = files["prometheus.yml"]["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert f"{port}:{port}" in services[host]["ports"]
    assert (ROOT / services["server"]["build"]["dockerfile"]).exists()


def test_the_gauges_of_a_dead_worker_are_taken_out(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    import os

    dead, alive = (tmp_path / f"gauge_livesum_{pid}.db" for pid in (process.pid, os.getpid()))
    for path in (dead, alive):
        path.touch()
    forget_dead(tmp_path)
    assert (dead.exists(), alive.exists()) == (False, True)


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (apt-get install prometheus)")
def test_a_real_prometheus_reads_the_numbers(client, tmp_path: Path) -> None:
    client.post("/generate", json={"prompt": "Once", "max_new_tokens": 2})
    config = (DEPLOY / "prometheus.yml").read_text()
    config = config.replace("server:8000", f"127.0.0.1:{client.base_url.port}").replace("5s", "1s")
    (tmp_path / "prometheus.yml").write_text(config)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [
        PROMETHEUS,
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        question = {"query": 'genai_pl_requests_total{route="/generate",status="200"}'}

        def known() -> bool:
            try:
                result = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=question).json()
            except (httpx.HTTPError, ValueError):
                return False
            return any(float(row["value"][1]) >= 1 for row in result.get("data", {}).get("result", []))

        assert eventually(known, seconds=40)
    finally:
        process.kill()
        process.wait()
