"""Variables of the chat template in requests of three APIs: prompts are those that transformers renders."""

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

import httpx

from genai_pl.serving.service import Service
from tests.serving.fake import FakeEngine
from tests.serving.servers import make_service, serving
from tests.serving.thinking import write_thinking_model

ASKED = [{"role": "user", "content": "Is it raining?"}]
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
BUDGET = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, httpx.Client]]:
    service = make_service(write_thinking_model(tmp_path_factory.mktemp("models") / "thinker"), cache=None)
    service.engine = FakeEngine(["Yes."])
    with serving(service) as client:
        yield service, client


def body_of(path: str, fields: dict) -> dict:
    turns = {"input": ASKED} if path == RESPONSES else {"messages": ASKED}
    return {**turns, **({"model": "thinker", "max_tokens": 4} if path == MESSAGES else {}), **fields}


@pytest.mark.parametrize(
    ("path", "fields", "variables"),
    [
        (CHAT, {}, {}),
        (CHAT, {"chat_template_kwargs": OFF}, OFF),
        (CHAT, {"reasoning_effort": "none"}, OFF),
        (CHAT, {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        (CHAT, {"reasoning_effort": "low", "chat_template_kwargs": ON}, {**ON, "reasoning_effort": "low"}),
        (RESPONSES, {"reasoning": {"effort": "high", "summary": "auto"}}, {"reasoning_effort": "high"}),
        (RESPONSES, {"reasoning": {"effort": "none"}}, OFF),
        (MESSAGES, {"thinking": {"type": "disabled"}}, OFF),
        (MESSAGES, {"thinking": BUDGET}, ON),
        (MESSAGES, {"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        (MESSAGES, {"output_config": {"effort": "high"}}, {}),
    ],
)
def test_the_prompt_is_that_of_transformers(path: str, fields: dict, variables: dict, served) -> None:
    service, client = served
    reply = client.post(path, json=body_of(path, fields))
    assert reply.status_code == 200, reply.text
    ids = service.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False, **variables)
    assert list(service.engine.requests[-1].input_ids) == ids
    # and tokens are counted so
    counts = {RESPONSES: f"{RESPONSES}/input_tokens", MESSAGES: f"{MESSAGES}/count_tokens", CHAT: "/tokenize"}
    body = body_of(path, fields)
    if path == CHAT:
        body = {"messages": ASKED, "chat_template_kwargs": variables}
    elif path == MESSAGES:
        del body["max_tokens"]
    counted = client.post(counts[path], json=body).json()
    assert counted.get("input_tokens", counted.get("count")) == len(ids)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        (CHAT, {"chat_template_kwargs": {"thinking": 1}}, "has no variable thinking, it reads enable_thinking, reason"),
        (CHAT, {"chat_template_kwargs": {"chat_template": "x"}}, "has no variable chat_template"),
        (CHAT, {"chat_template_kwargs": {"enable_thinking": [1]}}, "chat_template_kwargs.enable_thinking"),
        (CHAT, {"reasoning_effort": "huge"}, "reasoning_effort: Input should be 'none',"),
        (RESPONSES, {"reasoning": {"summary": "concise"}}, "reasoning.summary: Input should be 'auto', not 'concise'"),
        (RESPONSES, {"text": {"verbosity": "low"}}, "text.verbosity: Input should be 'medium', not 'low'"),
        (MESSAGES, {"output_config": {"efort": 1}}, "output_config.efort"),
    ],
)
def test_what_would_change_nothing_is_refused(path: str, fields: dict, message: str, served) -> None:
    reply = served[1].post(path, json=body_of(path, fields))
    assert reply.status_code == (400 if path == MESSAGES else 422)
    assert message in reply.json()["error"]["message"]


def test_an_effort_without_a_place_in_the_template_is_refused_by_its_name(client) -> None:
    for path, fields, name in (
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (RESPONSES, {"reasoning": {"effort": "low"}}, "reasoning.effort"),
        (MESSAGES, {"model": "tiny", "output_config": {"effort": "low"}}, "output_config.effort"),
    ):
        reply = client.post(path, json=body_of(path, fields))
        assert f"{name}: the chat template of this model has no option" in reply.json()["error"]["message"]
