"""Memory of a server: nothing is left of a request, whatever its route, its mistake or the way its client leaves."""

import gc
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

import httpx

from genai_pl.serving.app import create_app
from genai_pl.serving.connections import connection_options
from genai_pl.serving.settings import Limits
from tests.serving.fuzz import ADMIN, BODIES, Sent, leave
from tests.serving.servers import eventually, make_service, running
from tests.serving.test_adapter_reload import write_adapter
from tests.serving.thinking import write_thinking_model

WRONG = [b"", b"{", b'{"prompt": 1}', b'{"no_such_field": 1}', b'{"prompt": "x", "max_tokens": -1}']
STREAM = b'{"prompt": "Once upon a time", "stream": true, "max_new_tokens": 60, "temperature": 0}'


def ask_all(client: httpx.Client) -> int:
    """A body of each route, a mistake at each, and clients that leave; returns how many requests there were."""
    place, replies = (client.base_url.host, client.base_url.port), []
    for n, (path, bodies) in enumerate(BODIES.items()):
        replies.append(client.post(path, json=bodies[n % len(bodies)], headers=ADMIN))
        replies.append(client.post(path, content=WRONG[n % len(WRONG)], headers=ADMIN))
    replies += [client.get(path) for path in ("/no/such/route", "/metrics", "/v1/models")]
    assert all(reply.status_code < 500 for reply in replies)
    leaving = (0, 1, 300)  # bytes of the answer that the client reads
    for n, read in enumerate(leaving):
        leave(place, Sent(n, "POST", "/generate", STREAM, {"content-type": "application/json"}, read), 20)
    return len(replies) + len(leaving)


def counted() -> Counter[str]:
    """Objects of this package by type, and of all other modules together, that the garbage collector knows."""
    gc.collect()
    kinds = (type(one) for one in gc.get_objects())
    ours = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
    return Counter(name if name.startswith("genai_pl") else "others" for name in ours)


def test_no_object_is_left_of_a_request(tmp_path: Path) -> None:
    base, root = write_thinking_model(tmp_path / "tiny"), tmp_path / "adapters"
    adapters = {"polite": str(write_adapter(base, root / "polite", 1))}
    # what is kept on purpose is full, or has no entry that another request could add
    limits = Limits(max_tokens=60, stored_mib=0.001)
    options = {"name": "tiny", "cache": None, "adapters": adapters, "adapters_root": str(root), "limits": limits}
    service = make_service(base, prefix_cache_mib=0.05, **options)
    app = create_app(service, service.settings, service.metrics, (), ("admin",))
    with running(app, **connection_options()) as url, httpx.Client(base_url=url, timeout=60) as client:
        ask_all(client)
        seen = [counted()]
        n = ask_all(client)

        def is_as_before() -> bool:  # once the server has noticed that clients have left
            seen.append(counted())
            added = seen[-1] - seen[0]
            return added.pop("others", 0) < n / 2 and not added  # others: connections, and what Python caches

        assert eventually(is_as_before), seen[-1] - seen[0]
    blocks = service.engine.model_runner.prefix_blocks
    assert len(blocks.places) == len(blocks.pool)  # the cache was full, and has stayed within its bound
