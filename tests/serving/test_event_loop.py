"""The event loop is never held for long, whatever one client sends."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import gc
import json
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.data.tool_calls import FORMATS
from genai_pl.serving.app import create_app
from genai_pl.serving.engine.request import TokenOutput
from genai_pl.serving.http.bodies import HEAVY, Bodies
from genai_pl.serving.http.rendering import CHUNK_CHARS, json_chunks
from genai_pl.serving.http.responses import ChatFormat, CompletionFormat, listed
from genai_pl.serving.settings import Limits
from tests.serving.fake import FakeEngine, FakeStream
from tests.serving.probe import Probed
from tests.serving.servers import make_service, running

MOST = 5.0  # seconds, however busy the machine is: what is cubic takes far longer (25 s before it was bounded)
N = 100_000
BROKEN = {
    "openings": "<tool_call>" * N,
    "openings and spaces": ("<tool_call>" + " " * 50) * (N // 10),
    "spaces": "<tool_call>" + " " * (10 * N),
    "closings": "</tool_call>" * N,
    "empty calls": "<tool_call></tool_call>" * N,
    "half a closing": "<tool_call>" + "</tool_call" * N,
    "brackets": "<tool_call>" + "[" * N + "</tool_call>",
}


@pytest.mark.parametrize("case", BROKEN)
def test_calls_are_looked_for_in_a_time_that_grows_with_the_text_alone(case: str) -> None:
    began = time.perf_counter()
    for form in FORMATS:
        _, calls = form.parse(BROKEN[case], [])
        assert all(call.error or not call.arguments for call in calls)
    assert time.perf_counter() - began < 4  # the square of it would be minutes


def values(node: object) -> int:
    """Number of values in a body, by definition: a text, list or object counts HEAVY, a number 1."""
    if isinstance(node, str):
        return HEAVY
    if isinstance(node, list):
        return HEAVY + max(0, len(node) - 1) + sum(map(values, node))
    if isinstance(node, dict):
        inner = sum(1 + HEAVY + values(value) for value in node.values())
        return HEAVY + max(0, len(node) - 1) + inner
    return 0


def test_values_are_counted_without_what_stands_in_texts() -> None:
    draw = random.Random(0)

    def anything(depth: int = 0) -> object:
        kind = draw.random()
        if depth > 3 or kind < 0.4:
            return draw.choice([1, 'a,b:[{"', "\\", '\\"', None, "", "é"])
        if kind < 0.7:
            return [anything(depth + 1) for _ in range(draw.randrange(4))]
        return {draw.choice(["a", "\\", '"', ","]): anything(depth + 1) for _ in range(draw.randrange(4))}

    for _ in range(500):
        value = anything()
        raw, n = json.dumps(value).encode(), values(value)
        assert not Bodies(max_body=1, max_values=n)._are_too_many(raw)
        assert n == 0 or Bodies(max_body=1, max_values=n - 1)._are_too_many(raw)


TOOL = {"type": "function", "function": {"name": "a", "parameters": {}}}
TURN = {"role": "user", "content": "Hi"}
MANY = 262_000
HEAVIEST = {
    "numbers": ("/v1/completions", {"prompt": [7] * 131_000}),
    "numbers to embed": ("/v1/embeddings", {"input": [[7] * 127] * 1000}),
    "nothing": ("/v1/completions", {"prompt": [None] * MANY}),
    "a wrong end": ("/v1/completions", {"prompt": [7] * (MANY - 1000) + ["x"]}),
    "lists": ("/v1/completions", {"prompt": [[]] * (MANY // 9)}),
    "too many lists": ("/v1/completions", {"prompt": [[]] * MANY}),
    "turns": ("/v1/chat/completions", {"messages": [TURN] * 5000}),
    "empty turns": ("/v1/chat/completions", {"messages": [{}] * (MANY // 9)}),
    "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}] * 10_000}]}),
    "tools": ("/v1/chat/completions", {"messages": [TURN], "tools": [TOOL] * 2000}),
    "biases": ("/v1/completions", {"prompt": "x", "logit_bias": {str(-n): 1e9 for n in range(MANY // 11)}}),
    "choices": ("/v1/completions", {"prompt": "x", "guided_choice": [1] * (MANY - 1000)}),
    "a choice": ("/v1/completions", {"prompt": "x", "guided_choice": ["x" * 2_000_000]}),
    "a regular expression": ("/v1/completions", {"prompt": "x", "guided_regex": "a?" * 30_000}),
    "a pattern": ("/v1/completions", {"prompt": "x", "guided_json": {"type": "string", "pattern": "a?" * 30_000}}),
    "a deep schema": ("/v1/completions", '{"prompt": "x", "guided_json": ' + '{"a":' * 20_000),
    "an option that there is not": ("/v1/completions", {"prompt": "x", "odd": [[[]] * 9] * 2500}),
    "one text": ("/v1/completions", {"prompt": "a, b: " * 690_000}),
    "one text to score": ("/score", {"text": "a, b: " * 690_000}),
    "texts to score": ("/score", {"text": ["é" * 100] * 256}),
    "one prompt for all": ("/score", {"text": ["a"] * 256, "prompt": [TURN] * 2000}),
    "quotes": ("/score", '{"text": "' + '\\"' * 2_000_000),
    "brackets": ("/score", "[" * 4_000_000),
}


def test_no_request_keeps_the_event_loop_busy(tiny: Path) -> None:
    service = make_service(tiny, cache=None)
    probed = Probed(create_app(service, service.settings, service.metrics))
    lags = {}
    with running(probed) as url, httpx.Client(base_url=url, timeout=120) as client:
        assert client.get("/health").status_code == 200
        for name, (path, body) in HEAVIEST.items():
            raw = body if isinstance(body, str) else json.dumps(body, separators=(",", ":"))
            raw = raw.encode()
            assert len(raw) <= 4 * 2**20
            probed.reset()
            reply = client.post(path, content=raw, headers={"content-type": "application/json"})
            assert reply.status_code < 500, (name, reply.text)
            assert len(reply.content) < 50 * len(raw)
            lags[name] = probed.worst
    print({name: round(1000 * lag) for name, lag in sorted(lags.items(), key=lambda item: -item[1])})  # with -s
    assert max(lags.values()) < MOST, lags


class Long(FakeStream):
    """A stream of many tokens with `n_top` alternatives each, without any waiting."""

    def __init__(self, texts: list[str], n_top: int) -> None:
        super().__init__(texts, "stop")
        self.top = tuple((token, -1.0) for token in range(n_top))

    async def __aiter__(self):
        async for output in super().__aiter__():
            yield TokenOutput(output.text, 65, -1.0, self.top)


ANSWERS = {
    "alternatives": (
        "/v1/chat/completions",
        {"messages": [TURN], "logprobs": True, "top_logprobs": 20, "n": 4},
        2000,
        "",
    ),
    "a stream of alternatives": ("/v1/completions", {"prompt": "x", "logprobs": 20, "stream": True}, 2000, ""),
    "calls": ("/v1/chat/completions", {"messages": [TURN], "tools": [TOOL]}, 3000, "<tool_call> " * 10),
    "a stream of calls": (
        "/v1/chat/completions",
        {"messages": [TURN], "tools": [TOOL], "stream": True, "logprobs": True, "top_logprobs": 20},
        2000,
        "<tool_call> ",
    ),
}


def test_no_answer_keeps_the_event_loop_busy(tiny: Path) -> None:
    service = make_service(tiny, limits=Limits(max_tokens=4096))
    service.tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool }}{% endfor %}{{ messages[0].content }}"
    for one in service.tokenize_threads.tokenizers.values():
        one.chat_template = service.tokenizer.chat_template
    engine = service.engine = FakeEngine([])
    probed = Probed(create_app(service, service.settings, service.metrics))
    lags = {}
    with running(probed) as url, httpx.Client(base_url=url, timeout=120) as client:
        for name, (path, body, n, text) in ANSWERS.items():
            engine.make = lambda n=n, text=text, body=body: Long([text or "a"] * n, 20 if "logprobs" in body else 0)
            made = len(engine.streams)
            for again in (False, True):  # the second time from the cache
                probed.reset()
                reply = client.post(path, json={**body, "temperature": 0})
                assert reply.status_code == 200, reply.text
                lags[f"{name}{', kept' if again else ''}"] = probed.worst
            assert len(engine.streams) == made + body.get("n", 1)
    print({name: round(1000 * lag) for name, lag in sorted(lags.items(), key=lambda item: -item[1])})
    assert max(lags.values()) < MOST, lags


@pytest.mark.parametrize("answer_format", [ChatFormat, CompletionFormat])
def test_a_large_answer_is_made_of_few_objects_at_a_time(answer_format: type) -> None:
    """The garbage collector scans all objects from time to time, while nothing else runs."""
    outputs = [TokenOutput("a", 65, -1.0, tuple((token, -1.0) for token in range(20))) for _ in range(2000)]
    counts = []

    def decode(token: int) -> str:
        if token == 19:  # one for each output
            counts.append(len(gc.get_objects()) if len(counts) % 500 == 0 else 0)
        return "é"

    choice = answer_format(decode, 20).choice(0, outputs, "stop")
    gc.collect()
    gc.disable()
    try:
        made = json_chunks({"choices": iter([choice])})
    finally:
        gc.enable()
    assert max(counts) - counts[0] < 2000  # of 40,000 alternatives
    assert max(map(len, made)) < 2 * CHUNK_CHARS + 5000
    answer = json.loads(b"".join(made))["choices"][0]
    expected = answer_format(lambda token: "é", 20).choice(0, outputs, "stop")
    assert answer == {**expected, "logprobs": listed(expected["logprobs"])}


def test_embeddings_are_written_beside_the_event_loop(tmp_path: Path) -> None:
    from tests.serving.servers import write_model

    service = make_service(write_model(tmp_path / "wide", n_embd=1024, n_head=8))
    probed = Probed(create_app(service, service.settings, service.metrics))
    with running(probed) as url, httpx.Client(base_url=url, timeout=120) as client:
        probed.reset()
        reply = client.post("/v1/embeddings", json={"input": [[7, 8]] * 256})
        assert len(reply.json()["data"]) == 256
    assert probed.worst < MOST
