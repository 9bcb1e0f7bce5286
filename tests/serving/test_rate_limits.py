"""Rate limits of clients: requests and tokens a minute, and what a client is told that exceeds them."""

from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.serving.errors import ApiError
from genai_pl.serving.fair_queue import CLIENT
from genai_pl.serving.rate_limits import RateLimits


def retry_after(limits: RateLimits) -> int:
    with pytest.raises(ApiError) as raised:
        limits.admit()
    assert raised.value.status == 429
    return int(raised.value.headers["Retry-After"])


def test_requests_refill_over_the_minute() -> None:
    clock = [0.0]
    limits = RateLimits(6, None, now=lambda: clock[0])
    for _ in range(6):
        limits.admit()
    assert retry_after(limits) == 10  # one of six a minute
    clock[0] = 9.0
    assert retry_after(limits) == 1
    clock[0] = 10.0
    limits.admit()
    clock[0] = 1000.0  # a bucket holds no more than a minute's
    for _ in range(6):
        limits.admit()
    retry_after(limits)
    token = CLIENT.set("another")
    limits.admit()
    CLIENT.reset(token)


def test_an_overdraft_of_tokens_is_waited_for() -> None:
    clock = [0.0]
    limits = RateLimits(None, 60, now=lambda: clock[0])
    limits.admit()
    limits.spend(90)
    assert retry_after(limits) == 31  # 30 of debt, and one token
    clock[0] = 31.0
    limits.admit()


def test_a_key_has_its_own_limit_over_http(tiny: Path) -> None:
    from tests.serving.servers import make_service, serving

    service = make_service(tiny, cache=None, requests_per_minute=100, tokens_per_minute=20)
    service.rates.now = lambda: 0.0
    with serving(service, keys=("a", "b")) as client:

        def ask(key: str, path: str = "/v1/completions"):
            body = {"prompt": "Once", "max_tokens": 18}
            return client.post(path, json=body, headers={"authorization": f"Bearer {key}"})

        assert ask("a").status_code == 200
        refused = ask("a")
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "tokens_per_minute=20" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) == 9  # 4 + 18 - 20 of debt and one token, at 20 a minute
        assert ask("b").status_code == 200
        headers = {"authorization": "Bearer a"}
        assert client.get("/v1/models", headers=headers).status_code == 200  # only answers are limited
        assert client.get("/health").status_code == 200
