"""Structured outputs and logit bias, in one batch with other requests."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai", reason="needs pip install openai")
pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")
pytest.importorskip("llguidance", reason="needs pip install -e '.[constrain]'")

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bob"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
DENSE = {str(token): -100 for token in b" \n\t\r"}  # blanks would be most of a random model's JSON
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def ai(client) -> "Iterator[openai.OpenAI]":
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


def is_person(text: str) -> bool:
    answers = json.loads(text)
    return set(answers) == {"name", "n"} and answers["name"] in ("Ann", "Bob") and 0 <= answers["n"] <= 99


def test_each_answer_of_a_batch_has_the_form_that_it_was_asked_for(ai) -> None:
    common = {"model": "tiny", "max_tokens": 60, "temperature": 1.5, "logit_bias": DENSE}

    def chat(seed: int) -> str:
        answer = ai.chat.completions.create(messages=HELLO, seed=seed, response_format=AS_SCHEMA, **common)
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content

    def streamed(seed: int) -> str:
        form = {"structured_outputs": {"json": SCHEMA}}
        chunks = ai.chat.completions.create(messages=HELLO, seed=seed, stream=True, extra_body=form, **common)
        return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)

    def matching(seed: int) -> str:
        form = {"guided_regex": "[ab]{3}-[0-9]+x"}
        return ai.completions.create(prompt="Once", seed=seed, extra_body=form, **common).choices[0].text

    def free(seed: int) -> str:
        return ai.completions.create(prompt="Once", seed=seed, **common).choices[0].text

    kinds = [chat, free, matching, streamed] * 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: pair[1](pair[0]), enumerate(kinds)))
    for kind, text in zip(kinds, answers, strict=True):
        if kind in (chat, streamed):
            assert is_person(text)
        elif kind is matching:
            assert re.match("[ab]{3}-[0-9]+x?", text)
        else:
            assert text == free(answers.index(text))  # as it is alone


def test_any_json_object_and_one_of_some_texts(ai) -> None:
    close = {str(ord("}")): 100}
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 20, "temperature": 0}
    answers = ai.chat.completions.create(response_format={"type": "json_object"}, logit_bias=close, **options)
    assert answers.choices[0].message.content == "{}"
    texts = ["yes (1+1)", "no.", "[maybe]"]
    for form in ({"guided_choice": texts}, {"structured_outputs": {"choice": texts}}):
        for seed in range(4):
            sampled = {**options, "temperature": 2.0, "seed": seed, "extra_body": form}
            assert ai.chat.completions.create(**sampled).choices[0].message.content in texts


@pytest.mark.parametrize("liked", [" ", "\n", " \n\t\r"])
def test_json_ends_although_blanks_are_the_likeliest(ai, liked: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["yes"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    options = {"model": "tiny", "messages": HELLO, "max_tokens": 64, "temperature": 0}
    options["logit_bias"] = dict.fromkeys(map(str, liked.encode()), 100)
    [choice] = ai.chat.completions.create(response_format=form, **options).choices
    assert (choice.finish_reason, json.loads(choice.message.content)) == ("stop", {"a": "yes"})
    assert any(blank in choice.message.content for blank in liked)
    chunks = ai.chat.completions.create(response_format=form, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content


def test_a_token_can_be_all_there_is_or_never_be(ai) -> None:
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 6, "temperature": 0}
    assert ai.completions.create(logit_bias={"97": 100}, **options).choices[0].text == "aaaaaa"
    ascii_only = {str(token): -100 for token in range(128, 258)}
    plain = ai.completions.create(logit_bias=ascii_only, **options).choices[0].text
    other = ai.completions.create(logit_bias={**ascii_only, str(ord(plain[0])): -100}, **options).choices[0].text
    assert len(plain) == len(other) == 6
    assert plain[0] not in other


WRONG = {
    "response_format": [{"type": "yaml"}, {}, {"type": ["text"]}],
    "response_format.json_schema": [
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": 3}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://localhost/x"}}},
        {"type": "json_schema", "json_schema": {"schema": {"const": "\ud800"}}},
    ],
    "guided_regex": ["[0-", "(?=a)b"],
    "guided_json": ["[1]", "{broken", "serve.py"],
    "guided_choice": [[], [""]],
    "structured_outputs.grammar": [{"grammar": "root ::= x"}],
    "structured_outputs.choice": [{"choice": [1]}, {"choice": ["\ud800"]}],
    "logit_bias": [{"100000": 1}],
    "logit_bias.5": [{"5": 101}],
    "best_of": [3],
    "suffix": ["end"],
}


@pytest.mark.parametrize(("param", "value"), [(param, value) for param, values in WRONG.items() for value in values])
def test_what_cannot_be_is_refused_by_name(param: str, value: object, client) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2, param.split(".")[0]: value})
    reply = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 422, reply.text
    assert reply.json()["error"]["param"] == param
    assert "generation." not in reply.json()["error"]["message"]


def test_two_forms_are_one_too_many(client) -> None:
    body = {"prompt": "x", "guided_regex": "a", "response_format": {"type": "json_object"}}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 422
    assert "response_format and guided_regex: give one of them" in reply.json()["error"]["message"]


@pytest.mark.parametrize("lengths", [{"min_tokens": 2}, {"ignore_eos": True}])
def test_a_form_ends_an_answer_when_it_is_complete(client, lengths: dict) -> None:
    reply = client.post("/v1/completions", json={"prompt": "x", "guided_regex": "a", **lengths})
    assert reply.status_code == 422
    assert reply.json()["error"]["message"] == f"{next(iter(lengths))} and guided_regex: give one of them"
    plain = client.post("/v1/completions", json={"prompt": "x", "guided_regex": "a", "min_tokens": 0}).json()
    assert plain["choices"][0]["text"] == "a"


def test_without_the_library_a_form_is_refused_and_the_rest_goes_on(client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    body = {"messages": HELLO, "max_tokens": 2}
    reply = client.post("/v1/chat/completions", json={**body, "response_format": {"type": "json_object"}})
    assert reply.status_code == 422
    assert "response_format needs llguidance: pip install" in reply.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=body).status_code == 200
