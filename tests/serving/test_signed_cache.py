"""Signed cache entries: only entries that this server signed count, and only if they are complete answers."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import asyncio
import hashlib
import hmac
import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
redis = pytest.importorskip("redis", reason="needs pip install -e '.[serve]'")

from genai_pl.serving.answer_streams import decode_answer, encode_answer
from genai_pl.serving.engine.request import TokenOutput
from genai_pl.serving.response_cache import RedisCache
from genai_pl.serving.settings import CACHE_KEY
from tests.serving.fake import FakeEngine
from tests.serving.servers import make_service, serving


class Shelf:
    """An in-process stand-in for Redis whose entries the test can change."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}

    async def getrange(self, name: str, begin: int, end: int) -> bytes:
        if self.entries.get(name) == b"a list":
            raise redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")
        return self.entries.get(name, b"")[begin : end + 1]

    async def set(self, name: str, value: bytes, px: int) -> None:
        self.entries[name] = value

    async def aclose(self) -> None:
        """Do nothing."""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> RedisCache:
    monkeypatch.setenv(CACHE_KEY, "ours")
    cache = RedisCache("redis://127.0.0.1:1/0", ttl=5)
    cache.client = Shelf()
    return cache


def test_an_entry_is_signed_for_its_name_as_rfc_2104_says(cache: RedisCache) -> None:
    asyncio.run(cache.set("a", b"1"))
    [(name, value)] = cache.client.entries.items()
    assert name == "genai_pl:a"
    assert value == hmac.new(b"ours", b"a:1", hashlib.sha256).digest() + b"1"
    assert asyncio.run(cache.get("a")) == b"1"


FORGED = {
    "no signature": lambda good: b"1",
    "nothing": lambda good: b"",
    "another value": lambda good: good[:-1] + b"2",
    "of another server": lambda good: hmac.digest(b"theirs", b"a:1", "sha256") + b"1",
    "of another entry": lambda good: hmac.digest(b"ours", b"b:1", "sha256") + b"1",
    "cut": lambda good: good[:-1],
    "longer": lambda good: good + b"1",
    "what is no text": lambda good: b"a list",
}


@pytest.mark.parametrize("case", FORGED)
def test_an_entry_of_somebody_else_is_a_miss(case: str, cache: RedisCache) -> None:
    async def use() -> list[bytes | None]:
        await cache.set("a", b"1")
        await cache.set("other", b"2")
        cache.client.entries["genai_pl:a"] = FORGED[case](cache.client.entries["genai_pl:a"])
        return [await cache.get("a"), await cache.get("other")]

    assert asyncio.run(use()) == [None, b"2"]  # and the rest goes on


OUTPUTS = [TokenOutput("né\n", 65, -0.5, ((65, -0.5), (66, float("-inf")))), TokenOutput("", 256, None, ())]


def test_an_answer_comes_back_as_it_was() -> None:
    again = decode_answer(encode_answer("length", OUTPUTS))
    assert (again.finish_reason, again.n_generated, again.outputs) == ("length", 2, OUTPUTS)


def lines(*values: object) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


STRANGE = {
    "empty": b"",
    "no text": b"\xff\xfe",
    "no JSON": b"{",
    "an error as finish reason": lines("error", ["a", 1, None, []]),
    "no finish reason": lines({}, ["a", 1, None, []]),
    "no outputs": lines("stop"),
    "a number": b"1",
    "an output that is a number": lines("stop", 1),
    "an output of three values": lines("stop", ["a", 1, None]),
    "a text that is none": lines("stop", [1, 1, None, []]),
    "half a character": lines("stop", ["\ud800", 1, None, []]),
    "a token that is text": lines("stop", ["a", "1", None, []]),
    "a token below 0": lines("stop", ["a", -1, None, []]),
    "a token that is true": lines("stop", ["a", True, None, []]),
    "no number": lines("stop", ["a", 1, float("nan"), []]),
    "a log-probability above 0": lines("stop", ["a", 1, 3.0, []]),
    "alternatives of nothing": lines("stop", ["a", 1, None, [[1, -1.0]]]),
    "alternatives that are none": lines("stop", ["a", 1, -1.0, [1]]),
    "very deep": b'"stop"\n' + b"[" * 100_000,
    "the old form": json.dumps(["stop", 1, [["a", 1, None, []]]]).encode(),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_no_answer_is_a_miss_even_where_it_is_signed(case: str, tiny: Path, monkeypatch) -> None:
    assert decode_answer(STRANGE[case]) is None
    service = make_service(tiny)
    service.engine = FakeEngine(["some", " text"])

    async def get(key: str) -> bytes:
        return STRANGE[case]

    monkeypatch.setattr(service.cache, "get", get)
    with serving(service) as client:
        for path, body in (("/generate", {}), ("/v1/completions", {"logprobs": 2})):
            reply = client.post(path, json={"prompt": "x", "temperature": 0, **body})
            assert reply.status_code == 200
            assert "some text" in reply.text
        assert 'genai_pl_cache_lookups_total{result="miss"} 2.0' in client.get("/metrics").text
