"""The response cache: which answers it keeps, for how long, and a Redis that fails."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import asyncio
import logging
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
redis = pytest.importorskip("redis", reason="needs pip install -e '.[serve]'")

from genai_pl.data import byte_tokenizer
from genai_pl.serving.response_cache import MemoryCache, RedisCache, make_cache, model_hash
from genai_pl.serving.server import bind
from tests.serving.fake import FakeEngine
from tests.serving.servers import eventually, make_service, serving

REDIS = shutil.which("redis-server", path="/usr/bin:/usr/local/bin")


def test_the_least_recently_used_goes_first() -> None:
    async def use() -> list[bytes | None]:
        cache = MemoryCache(limit=10, ttl=60)
        await cache.set("a", b"12345")
        await cache.set("b", b"12345")
        await cache.get("a")
        await cache.set("c", b"123")
        await cache.set("too large", b"x" * 11)
        return [await cache.get(key) for key in ("a", "b", "c", "too large")]

    assert asyncio.run(use()) == [b"12345", None, b"123", None]


def test_what_is_replaced_does_not_count_twice() -> None:
    async def use() -> list[bytes | None]:
        cache = MemoryCache(limit=10, ttl=60)
        for _ in range(5):
            await cache.set("a", b"12345")
        await cache.set("b", b"12345")
        return [await cache.get("a"), await cache.get("b")]

    assert asyncio.run(use()) == [b"12345", b"12345"]


def test_an_entry_is_kept_for_its_time() -> None:
    clock = [0.0]

    async def use() -> list[bytes | None]:
        cache = MemoryCache(limit=10, ttl=5, now=lambda: clock[0])
        await cache.set("a", b"1")
        clock[0] = 4.9
        before = await cache.get("a")
        clock[0] = 5.0
        return [before, await cache.get("a")]

    assert asyncio.run(use()) == [b"1", None]


def test_a_models_name_is_what_it_computes() -> None:
    import torch

    from genai_pl.models import ModelConfig, build_model

    tokenizer = byte_tokenizer()
    config = ModelConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=258, max_seq_len=16)
    torch.manual_seed(0)
    model, other = build_model(config), build_model(config)
    first = model_hash(model, tokenizer)
    assert model_hash(other, tokenizer) != first
    other.load_state_dict(model.state_dict())
    assert model_hash(other, tokenizer) == first
    with torch.no_grad():
        other.embed.weight[3, 3] += 1e-3
    assert model_hash(other, tokenizer) != first
    assert model_hash(model.to(torch.bfloat16), tokenizer) != first


CASES = {
    "greedy": ({"temperature": 0}, True),
    "a seed": ({"temperature": 1, "seed": 3}, True),
    "drawn": ({"temperature": 1}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_comes_out_the_same_again_is_kept(case: str, tiny: Path) -> None:
    options, is_cached = CASES[case]
    service = make_service(tiny)
    service.engine = FakeEngine(["some", " text"])
    with serving(service) as client:
        first, again = (client.post("/generate", json={"prompt": "x", **options}).json() for _ in range(2))
        assert first == again
        assert first["text"] == "some text"
        assert len(service.engine.streams) == (1 if is_cached else 2)
        hits = f'genai_pl_cache_lookups_total{{result="hit"}} {1.0 if is_cached else 0.0}'
        assert hits in client.get("/metrics").text
        client.post("/generate", json={"prompt": "x", **options, "max_new_tokens": 3})  # another request
        client.post("/v1/completions", json={"prompt": "x", **options, "max_tokens": 3, "logprobs": 1})
        assert len(service.engine.streams) == (3 if is_cached else 4)


def test_a_stream_is_answered_from_the_cache_too(tiny: Path) -> None:
    service = make_service(tiny)
    service.engine = FakeEngine(["some", " text"])
    body = {"prompt": "x", "temperature": 0, "max_tokens": 5, "stream": True}
    with serving(service) as client:
        first, again = (client.post("/v1/completions", json=body).text for _ in range(2))
    assert len(service.engine.streams) == 1
    assert first.count("data: ") == again.count("data: ") == 4


@pytest.mark.parametrize("finish_reason", ["deadline", "error"])
def test_what_broke_off_is_not_kept(finish_reason: str, tiny: Path) -> None:
    service = make_service(tiny)
    service.engine = FakeEngine(["some"], finish_reason)
    with serving(service) as client:
        for _ in range(2):
            assert client.post("/generate", json={"prompt": "x"}).status_code >= 500
    assert len(service.engine.streams) == 2


@contextmanager
def redis_server(folder: Path, port: int | None = None) -> Iterator[int]:
    """The port of a Redis server that the test starts."""
    if port is None:
        with bind("127.0.0.1", 0) as free:
            port = free.getsockname()[1]
    command = [REDIS, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port) as client:
            assert eventually(lambda: answers(client))
        yield port
    finally:
        process.kill()
        process.wait()


def answers(client) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (apt-get install redis-server)")
def test_redis_keeps_answers_for_every_server_and_may_go_away(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = {"prompt": "x", "temperature": 0}
    with redis_server(tmp_path) as port:
        url = f"redis://127.0.0.1:{port}/2"
        first, second = (make_service(tiny, cache=url, cache_ttl=100) for _ in range(2))
        first.engine, second.engine = FakeEngine(["some"]), FakeEngine(["other"])
        clock = [0.0]
        second.cache.now = lambda: clock[0]
        with serving(first) as client:
            assert client.post("/generate", json=body).json()["text"] == "some"
        with redis.Redis(port=port, db=2) as inside:
            [key] = inside.keys()
            assert 0 < inside.ttl(key) <= 100
        server = serving(second)
        client = server.__enter__()
        assert client.post("/generate", json=body).json()["text"] == "some"  # the first server's
    with caplog.at_level(logging.WARNING, "genai_pl.serving"):
        for _ in range(3):  # Redis is gone
            assert client.post("/generate", json=body).json()["text"] == "other"
        assert [r.levelname for r in caplog.records if "going on without it" in r.message] == ["WARNING"]
        with redis_server(tmp_path, port):
            clock[0] += 60
            client.post("/generate", json=body)
            assert "answers again" in caplog.text
            n = len(second.engine.streams)
            client.post("/generate", json=body)
            assert len(second.engine.streams) == n
            server.__exit__(None, None, None)


def test_a_redis_that_was_never_there_harms_nothing() -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    async def use() -> bytes | None:
        cache = RedisCache(f"redis://127.0.0.1:{port}/0", ttl=1)
        await cache.set("a", b"1")
        value = await cache.get("a")
        await cache.close()
        return value

    assert asyncio.run(use()) is None


def test_the_option_names_the_cache() -> None:
    assert make_cache(None, ttl=1, mib=1) is None
    assert isinstance(make_cache("memory", ttl=1, mib=1), MemoryCache)
    assert isinstance(make_cache("redis://localhost/1", ttl=1, mib=1), RedisCache)
