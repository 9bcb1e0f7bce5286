"""POST /generate against transformers' generate."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")


@pytest.fixture(scope="module")
def greedy(tiny: Path):
    """The greedy continuation by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)

    def continued(prompt: str, n: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(ids))
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return continued


def complete_text(text: str) -> str:
    """The text without bytes at its end that are no complete character, which are not sent."""
    return text.rstrip("\ufffd")


def stream(client, body: dict, path: str = "/generate") -> list:
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_the_answer_is_what_transformers_writes(client, greedy) -> None:
    reply = client.post("/generate", json={"prompt": "Once upon", "max_new_tokens": 12})
    assert reply.status_code == 200
    answer = reply.json()
    assert answer["text"] == complete_text(greedy("Once upon", 12))
    assert answer["response"] == "Once upon" + answer["text"]
    assert answer["finish_reason"] == "length"
    assert (answer["prompt_tokens"], answer["generated_tokens"]) == (9, 12)


def test_a_prompt_is_all_that_is_needed(client) -> None:
    answer = client.post("/generate", json={"prompt": "To be"}).json()
    assert answer["response"].startswith("To be")
    assert answer["generated_tokens"] <= 16  # as the server was started


def test_the_pieces_of_a_stream_are_the_answer(client) -> None:
    body = {"prompt": "Once upon", "max_new_tokens": 12}
    events = stream(client, body)
    whole = client.post("/generate", json=body).json()
    assert "".join(event["text"] for event in events) == whole["text"]
    assert len(events) > 2
    assert events[-1] == {"text": "", **{k: whole[k] for k in ("finish_reason", "prompt_tokens", "generated_tokens")}}


def test_a_seed_draws_the_same_again_and_another_seed_something_else(client) -> None:
    body = {"prompt": "Once", "temperature": 1.5, "top_k": 40, "max_new_tokens": 20}
    first, again, other = (client.post("/generate", json={**body, "seed": n}).json()["text"] for n in (1, 1, 2))
    assert first == again != other


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client) -> None:
    text = client.post(
        "/generate", json={"prompt": "Once", "max_new_tokens": 30, "seed": 3, "temperature": 1.0}
    ).json()["text"]
    stop = next(c for c in text[3:] if ord(c) < 128)
    answer = client.post(
        "/generate", json={"prompt": "Once", "max_new_tokens": 30, "seed": 3, "temperature": 1.0, "stop": [stop]}
    ).json()
    assert answer["text"] == text.split(stop)[0]
    assert answer["finish_reason"] == "stop"


WRONG = {
    "prompt": {"prompt": 3},
    "temperature": {"prompt": "x", "temperature": -1},
    "top_p": {"prompt": "x", "top_p": 2},
    "top_k": {"prompt": "x", "top_k": 0},
    "min_p": {"prompt": "x", "min_p": "much"},
    "repetition_penalty": {"prompt": "x", "repetition_penalty": 0},
    "seed": {"prompt": "x", "seed": 2**63},
    "timeout": {"prompt": "x", "timeout": 0},
    "max_new_tokens": {"prompt": "x", "max_new_tokens": 65},
    "stop.0": {"prompt": "x", "stop": [""]},
    "max_tokens": {"prompt": "x", "max_tokens": 3},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_is_refused_by_its_name(field: str, client) -> None:
    reply = client.post("/generate", json=WRONG[field])
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == field
    assert field in reply.json()["error"]["message"]


def test_a_missing_prompt_and_a_body_that_is_no_json_are_refused(client) -> None:
    assert client.post("/generate", json={}).json()["error"]["param"] == "prompt"
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[1]", b"nonsense", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000):
        reply = client.post("/generate", content=content, headers=json_type)
        assert reply.status_code in (400, 422), content[:20]
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_json_that_is_not_called_json_is_refused_with_the_header_that_is_missing(client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):  # what a page of another origin may send unasked
        reply = client.post("/generate", content=b'{"prompt": "x"}', headers={"content-type": kind})
        assert reply.status_code == 422
        assert "Content-Type: application/json" in reply.json()["error"]["message"]


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(client) -> None:
    reply = client.post("/generate", json={"prompt": "x" * 200})
    assert reply.status_code == 400
    assert "200 tokens" in reply.json()["error"]["message"]
    assert "128" in reply.json()["error"]["message"]


def test_an_answer_ends_with_the_context(client) -> None:
    answer = client.post("/generate", json={"prompt": "x" * 120, "max_new_tokens": 40}).json()
    assert answer["generated_tokens"] <= 8


def test_a_large_body_is_refused_whether_it_says_its_length_or_not(client) -> None:
    large = b'{"prompt": "' + b"x" * 300_000 + b'"}'
    assert client.post("/generate", content=large).status_code == 413
    assert client.post("/generate", content=iter([large[:1000], large[1000:]])).status_code == 413
    assert client.post("/generate", json={"prompt": "x"}).status_code == 200


def test_an_unknown_adapter_is_not_found(client) -> None:
    reply = client.post("/generate", json={"prompt": "x", "adapter": "nobody"})
    assert reply.status_code == 404
    assert "there is tiny" in reply.json()["error"]["message"]


def test_other_paths_and_methods_have_errors_of_the_same_shape(client) -> None:
    for reply, status in ((client.get("/nowhere"), 404), (client.get("/generate"), 405), (client.put("/"), 405)):
        assert reply.status_code == status
        assert reply.json()["error"]["message"]


def test_load_balancers_may_ask_for_the_head_alone(client) -> None:
    for path in ("/health", "/ready"):
        reply = client.head(path)
        assert (reply.status_code, reply.content) == (client.get(path).status_code, b"")


def test_the_description_names_every_option(client) -> None:
    schema = client.get("/openapi.json").json()
    fields = schema["components"]["schemas"]["GenerateBody"]["properties"]
    assert {"prompt", "max_new_tokens", "temperature", "top_k", "top_p", "stop", "seed", "adapter", "stream"} <= set(
        fields
    )
    assert {"/generate", "/score", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/health"} <= set(
        schema["paths"]
    )


def test_characters_of_several_tokens_are_never_cut(tiny: Path) -> None:
    from tests.serving.servers import GREEDY, make_service, serving

    prefix = "né 日本 🙂 "  # of 1, 2, 3 and 4 bytes, each of them a token
    with serving(make_service(tiny, generation={**GREEDY, "prefix": prefix, "max_new_tokens": 30})) as client:
        texts = [event["text"] for event in stream(client, {"prompt": "x"})]
        talk = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 30}
        events = [
            event["choices"][0]["delta"].get("content", "") for event in stream(client, talk, "/v1/chat/completions")
        ]
    for answer in (texts, [text for text in events if text]):
        assert answer[: len(prefix)] == list(prefix)
