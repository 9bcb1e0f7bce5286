"""A server under attack still answers patient clients in time."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.serving.app import create_app
from genai_pl.serving.connections import connection_options
from genai_pl.serving.settings import Limits
from tests.serving.attacks import ATTACKS, mix
from tests.serving.servers import eventually, make_service, running

SECONDS = 20.0


@pytest.mark.slow
def test_patient_clients_are_answered_while_others_attack(tiny: Path) -> None:
    service = make_service(tiny, cache=None, limits=Limits(timeout=30))
    app = create_app(service, service.settings, service.metrics)
    assert len(ATTACKS) >= 20
    with running(app, **connection_options()) as url:
        seen = mix(url, SECONDS)
        failed = {key: n for key, n in seen.statuses.items() if key[1] >= 500 and key[0] != "many answers"}
        assert not failed, seen.statuses  # whoever asks for more than there is time for is told so (504)
        assert set(seen.statuses) >= {("patient", 200), ("health", 200)}
        assert {status for kind, status in seen.statuses if kind == "health"} == {200}
        assert len(seen.answers) > SECONDS / 2
        assert max(seen.health) < 5
        assert eventually(lambda: service.engine.n_running == service.engine.n_waiting == 0, seconds=60)
        assert httpx.post(f"{url}/generate", json={"prompt": "x", "max_new_tokens": 1}).status_code == 200
