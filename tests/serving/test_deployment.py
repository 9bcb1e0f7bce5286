"""Files under deploy/: they agree with each other and with the server's options."""

import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_manifests_fit_together_and_give_time_to_drain() -> None:
    from genai_pl.serving.server import TO_GIVE_UP

    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "genai_pl.yaml").read_text()))
    deployment, service, scaler = documents
    assert [one["kind"] for one in documents] == ["Deployment", "Service", "HorizontalPodAutoscaler"]
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    [container] = pod["spec"]["containers"]
    options = dict(argument.split("=") for argument in container["args"])
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert wait + float(options["drain"]) + TO_GIVE_UP <= pod["spec"]["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }


def test_no_client_keeps_an_idle_connection_as_long_as_the_server() -> None:
    import httpx

    from genai_pl.serving.connections import IDLE_SECONDS

    # of the official clients of OpenAI and Anthropic too, which are built on httpx
    assert httpx.Limits().keepalive_expiry < IDLE_SECONDS
    [proxy] = re.findall(r"keepalive_timeout (\d+)s;", (DEPLOY / "nginx.conf").read_text())
    assert int(proxy) < IDLE_SECONDS
    [worker] = re.findall(r"^keepalive = (\d+)", (DEPLOY / "gunicorn.conf.py").read_text(), flags=re.MULTILINE)
    assert int(worker) == IDLE_SECONDS


def test_paths_metrics_and_options_of_the_files_exist() -> None:
    from genai_pl.serving.app import create_app
    from genai_pl.serving.http.upstream import Upstream
    from genai_pl.serving.metrics import Metrics
    from genai_pl.serving.settings import Settings

    settings, metrics = Settings(backend="openai", url="http://x/v1", name="m"), Metrics()
    app = create_app(Upstream(settings, metrics), settings, metrics)
    text = (DEPLOY / "kubernetes" / "genai_pl.yaml").read_text() + (DEPLOY / "genai_pl.service").read_text()
    assert {"/ready", "/health"} <= set(app.openapi()["paths"])
    assert "path: /ready" in text
    assert "genai_pl_queue_waiting" in metrics.text().decode()
    command = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    names = [word.split("=")[0] for word in command.removeprefix("ExecStart=").split() if "=" in word]
    assert set(names) <= set(Settings.__dataclass_fields__)


def test_the_manifests_have_the_fields_of_the_kubernetes_api() -> None:
    """By the API's own schemas (strict: a field that they do not have is a mistake), of the oldest and newest version at hand."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs pip install kubernetes-validate")

    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "genai_pl.yaml").read_text()))
    for version in ("1.27", "1.34"):
        for document in documents:
            assert kubernetes_validate.validate(document, version, strict=True) == version
    # and the schemas are really asked
    documents[0]["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        kubernetes_validate.validate(documents[0], "1.34", strict=True)
