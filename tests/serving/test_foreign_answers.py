"""Invalid replies of an upstream server: always 502 with a request id, and no content of the reply for clients."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
import logging

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
httpx = pytest.importorskip("httpx")

from genai_pl.serving.response_cache import MemoryCache
from genai_pl.serving.settings import Limits
from tests.conftest import some
from tests.serving.test_proxy import ASKED, proxy

INSIDE = "sk-inside"


def plain(content: bytes | str, status: int = 200, **headers: str):
    return lambda request: httpx.Response(status, content=content, headers=headers)


def reply_with(value: object, status: int = 200):
    return plain(json.dumps(value), status)


def breaking(error: type[Exception]):
    def answer(request) -> "httpx.Response":
        raise error(INSIDE)

    return answer


USAGE = {"prompt_tokens": 1, "completion_tokens": 1}
RIGHT = {"text": "a", "finish_reason": "stop", "index": 0}
ANSWERS = {
    "nothing": plain(b""),
    "HTML": plain(f"<html>{INSIDE}"),
    "no UTF-8": plain(b'{"choices": "\xff\xfe"}'),
    "a number": reply_with(3),
    "null": reply_with(None),
    "a list": reply_with([RIGHT]),
    "an empty object": reply_with({}),
    "deep": plain("[" * 100_000),
    "deep in an object": plain('{"choices":' * 50_000),
    "not a number": plain('{"choices": [], "usage": NaN}'),
    "infinity": plain('{"choices": [], "x": 1e999}'),
    "half a character": plain('{"choices": [], "data": [], "x": "\\ud800"}'),
    "a very long number": plain('{"choices": [], "x": ' + "9" * 5000 + "}"),
    "choices of text": reply_with({"choices": "a", "data": "a"}),
    "choices of numbers": reply_with({"choices": [1], "data": [1]}),
    "usage of text": reply_with({"choices": [RIGHT], "data": [{"id": 3}], "usage": {"prompt_tokens": "a"}}),
    "usage below 0": reply_with({"choices": [RIGHT], "data": [{"id": 3}], "usage": {"prompt_tokens": -1}}),
    "usage of halves": reply_with({"choices": [RIGHT], "data": [{"id": 3}], "usage": {"completion_tokens": 0.5}}),
    "moved": plain(b"", 301, location=f"http://{INSIDE}/"),
    "moved in a circle": plain(b"", 307, location="http://elsewhere/v1/completions"),
    "no content": plain(b"", 204),
    "not modified": plain(b"", 304),
    "a wrong key": reply_with({"error": {"message": f"key {INSIDE} is wrong"}}, 401),
    "forbidden": reply_with({"error": INSIDE}, 403),
    "a failure": plain(INSIDE, 500),
    "a failure with a trace": reply_with({"detail": [INSIDE]}, 503),
    "a status that nobody knows": plain(INSIDE, 599),
    "broken gzip": plain(b"no gzip", **{"content-encoding": "gzip"}),
    "a protocol error": breaking(httpx.RemoteProtocolError),
    "a read error": breaking(httpx.ReadError),
    "a connection error": breaking(httpx.ConnectError),
    "a decoding error": breaking(httpx.DecodingError),
    "too many redirects": breaking(httpx.TooManyRedirects),
}
ONLY_GENERATE = {
    "two choices": reply_with({"choices": [RIGHT, RIGHT]}),
    "no choice": reply_with({"choices": []}),
    "no text": reply_with({"choices": [{"finish_reason": "stop"}]}),
    "a text that is none": reply_with({"choices": [{**RIGHT, "text": None}]}),
    "a reason that is none": reply_with({"choices": [{**RIGHT, "finish_reason": {}}]}),
}


def check(reply, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check an error answer: status and request id, and nothing else."""
    assert reply.status_code == 502, (case, reply.text)
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "upstream_error"
    assert reply.headers["x-request-id"] in error["message"]
    assert reply.headers["x-request-id"] in caplog.text
    for inside in (INSIDE, "elsewhere", "Error", "Traceback"):
        assert inside not in reply.text


@pytest.mark.parametrize("case", some(ANSWERS))
def test_an_answer_that_makes_no_sense_is_a_bad_gateway(case: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "genai_pl.serving"),
        proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(ANSWERS[case])) as front,
    ):
        for path, body in ASKED.items():
            check(front.post(path, json=body), case, caplog)
        check(front.get("/v1/models/m"), case, caplog)


@pytest.mark.parametrize("case", ONLY_GENERATE)
def test_a_completion_that_is_none_is_a_bad_gateway(case: str, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "genai_pl.serving"),
        proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(ONLY_GENERATE[case])) as front,
    ):
        check(front.post("/generate", json=ASKED["/generate"]), case, caplog)


def stream_of(*events: str, end: str = "data: [DONE]\n\n"):
    return plain("".join(f"data: {event}\n\n" for event in events) + end, **{"content-type": "text/event-stream"})


STREAMS = {
    "no JSON": stream_of("{broken"),
    "a number": stream_of("3"),
    "a list": stream_of("[]"),
    "deep": stream_of("[" * 100_000),
    "no number": stream_of('{"choices": [], "x": NaN}'),
    "half a character": stream_of('{"choices": [{"text": "\\ud800"}]}'),
    "an error": stream_of(json.dumps({"error": {"message": INSIDE}})),
    "broken off": stream_of(end=""),
    "nothing but an end": stream_of(),
    "no stream": reply_with({"choices": [RIGHT]}),
    "a failure": plain(INSIDE, 500),
    "gzip": plain(b"no gzip", **{"content-encoding": "gzip"}),
}
STREAMS_OF_GENERATE = {
    "no choices": stream_of('{"x": 1}'),
    "choices of numbers": stream_of('{"choices": [1]}'),
    "text that is none": stream_of('{"choices": [{"text": [1]}]}'),
    "a reason that is none": stream_of('{"choices": [{"text": "", "finish_reason": [1]}]}'),
    "usage that is none": stream_of('{"choices": [], "usage": {"prompt_tokens": []}}'),
}
CASES = [(path, case) for path in ("/v1/completions", "/generate") for case in STREAMS]
CASES += [("/generate", case) for case in STREAMS_OF_GENERATE]


@pytest.mark.parametrize(("path", "case"), some(CASES))
def test_a_stream_that_makes_no_sense_is_a_bad_gateway(path: str, case: str, caplog: pytest.LogCaptureFixture) -> None:
    transport = httpx.MockTransport({**STREAMS, **STREAMS_OF_GENERATE}[case])
    with (
        caplog.at_level(logging.WARNING, "genai_pl.serving"),
        proxy("http://elsewhere/v1", name="m", transport=transport) as front,
    ):
        check(front.post(path, json={**ASKED[path], "stream": True}), case, caplog)


def test_nonsense_after_the_first_event_ends_the_stream_with_an_error() -> None:
    answer = stream_of('{"choices": [{"text": "a"}]}', "{broken")
    with proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(answer)) as front:
        text = front.post("/v1/completions", json={"prompt": "x", "stream": True}).text
    assert "upstream_error" in text
    assert "[DONE]" not in text


def test_an_answer_without_end_is_given_up() -> None:
    import asyncio

    async def drip(request) -> "httpx.Response":
        async def parts():
            while True:
                await asyncio.sleep(0.02)
                yield b" "

        return httpx.Response(200, content=parts())

    transport, limits = httpx.MockTransport(drip), Limits(timeout=0.3)
    with proxy("http://elsewhere/v1", name="m", transport=transport, limits=limits) as front:
        for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
            assert front.post("/v1/completions", json=body).status_code == 504


def test_a_retry_after_that_is_no_number_of_seconds_is_left_out() -> None:
    for retry_after in ("soon", "99999999999", "1e3", "-1", "é"):
        answer = lambda request, retry_after=retry_after: httpx.Response(  # noqa: E731
            429, json={"error": {"message": "wait"}}, headers=[(b"retry-after", retry_after.encode())]
        )
        with proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(answer)) as front:
            reply = front.post("/v1/completions", json={"prompt": "x"})
        assert reply.status_code == 429
        assert "retry-after" not in reply.headers


KEPT = [b"", b"{", b"1", b"[]", b"[1]", b'["{"]', b'["3"]', b"\xff", b'{"x": NaN}', b"[" * 100_000, b'"a"']


@pytest.mark.parametrize("entry", KEPT)
def test_what_lies_in_the_cache_and_is_no_answer_is_a_miss(entry: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(self: MemoryCache, key: str) -> bytes:
        return entry

    monkeypatch.setattr(MemoryCache, "get", get)
    right = {"choices": [RIGHT], "data": [], "usage": USAGE}
    with proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(reply_with(right))) as front:
        for path, body in ASKED.items():
            assert front.post(path, json=body).status_code == 200
    whole = stream_of('{"choices": [{"text": "a"}]}')
    with proxy("http://elsewhere/v1", name="m", transport=httpx.MockTransport(whole)) as front:
        reply = front.post("/v1/completions", json={**ASKED["/v1/completions"], "stream": True})
        assert reply.text.endswith("data: [DONE]\n\n")
