"""OpenAI's client at /v1/responses: items, streams, functions, earlier responses and their memory."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

openai = pytest.importorskip("openai", reason="needs pip install openai")
pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.messages import Message
from genai_pl.serving.http.response_memory import ResponseMemory
from tests.serving.fake import FakeEngine, playing
from tests.serving.thinking import CALLS, THOUGHTS, write_thinking_model

TOOL = {
    "type": "function",
    "name": "weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
ADDED, DONE = "response.output_item.added", "response.output_item.done"


@pytest.fixture(scope="module")
def ai(client) -> "Iterator[openai.OpenAI]":
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as ai:
        yield ai


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinking_model(tmp_path_factory.mktemp("models") / "thinker")


@pytest.fixture
def play(folder: Path):
    """A client of a server whose fake engine generates the texts."""
    with playing(folder, lambda url: openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)) as start:
        yield start


def rendered(folder: Path, engine: FakeEngine) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).decode(engine.requests[-1].input_ids)


def test_a_response_is_the_answer_of_the_chat(ai) -> None:
    options = {"model": "tiny", "temperature": 0}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chat = ai.chat.completions.create(**options, messages=turns, max_tokens=6)
    response = ai.responses.create(**options, instructions="Be brief.", input="Hello", max_output_tokens=6)
    assert response.output_text == chat.choices[0].message.content
    assert (response.object, response.status) == ("response", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat.usage.prompt_tokens, 6)
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    again = ai.responses.create(**options, instructions="Be brief.", input=parts, max_output_tokens=6)
    assert again.output_text == response.output_text


def test_a_stream_has_numbered_events_and_ends_with_the_response(play) -> None:
    ai, _ = play(THOUGHTS)
    events = list(ai.responses.create(model="thinker", input="Is it raining?", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert [event.item.type for event in events if event.type == ADDED] == ["reasoning", "message"]
    thoughts = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert (thoughts, text) == ("Let me look.\nOutside.", "It is dry.")
    final = events[-1]
    assert (final.type, final.response.status) == ("response.completed", "completed")
    assert [item.id for item in final.response.output] == [event.item.id for event in events if event.type == DONE]
    assert final.response.output_text == text
    assert final.response.usage.output_tokens_details.reasoning_tokens == 5
    assert final.response.usage.output_tokens == len(THOUGHTS)
    with ai.responses.stream(model="thinker", input="Is it raining?") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text
    assert ai.responses.retrieve(final.response.id).output_text == text


def test_functions_are_called_and_answered(play, folder: Path) -> None:
    ai, engine = play(CALLS)
    asked = {"model": "thinker", "input": "Is it raining?", "tools": [TOOL]}
    response = ai.responses.create(**asked)
    assert [item.type for item in response.output] == ["message", "function_call"]
    call = response.output[1]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Zürich"})
    events = list(ai.responses.create(**asked, stream=True))
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments) == {"city": "Zürich"}
    assert events[-1].response.output[1].name == "weather"

    said = {"type": "function_call_output", "call_id": call.call_id, "output": "It is dry."}
    ai.responses.create(model="thinker", input=[said], previous_response_id=response.id, tools=[TOOL])
    text = rendered(folder, engine)
    assert "user: Is it raining?\nassistant: Let me see.<tool_call>" in text
    assert text.endswith("tool: It is dry.\nassistant: ")
    # the same conversation as items
    items = [{"role": "user", "content": "Is it raining?"}, *[item.model_dump() for item in response.output], said]
    ai.responses.create(model="thinker", input=items, tools=[TOOL])
    assert rendered(folder, engine) == text


def test_only_allowed_tools_are_shown(play, folder: Path) -> None:
    ai, engine = play(CALLS)
    asked = {"model": "thinker", "input": "Is it raining?", "tools": [{**TOOL, "name": "other"}, TOOL]}
    response = ai.responses.create(**asked, tool_choice=ALLOWED)
    assert [item.name for item in response.output if item.type == "function_call"] == ["weather"]
    assert (response.tool_choice.type, response.tool_choice.mode) == ("allowed_tools", "auto")
    text = rendered(folder, engine)
    ai.responses.create(**{**asked, "tools": [TOOL]})
    assert rendered(folder, engine) == text
    other = {**ALLOWED, "tools": [{"type": "function", "name": "other"}]}
    response = ai.responses.create(**asked, tool_choice=other)  # a call of another one is no call
    assert [item.type for item in response.output] == ["message"]


def test_the_input_of_a_response_is_listed(ai) -> None:
    options = {"model": "tiny", "max_output_tokens": 2}
    parts = [{"type": "input_text", "text": "Hello"}]
    first = ai.responses.create(**options, input=[{"role": "user", "content": parts, "id": "msg_mine"}])
    second = ai.responses.create(**options, input="So?", previous_response_id=first.id)
    listed = list(ai.responses.input_items.list(second.id, order="asc"))
    assert [(item.id, item.role) for item in listed[:2]] == [("msg_mine", "user"), (first.output[0].id, "assistant")]
    assert (listed[2].role, listed[2].content[0].type, listed[2].content[0].text) == ("user", "input_text", "So?")
    paged = list(ai.responses.input_items.list(second.id, limit=1))  # the client asks for page after page
    assert [item.id for item in paged] == [item.id for item in listed[::-1]]
    with pytest.raises(openai.UnprocessableEntityError, match="greater than or equal to 1") as raised:
        ai.responses.input_items.list(second.id, limit=0)
    assert raised.value.param == "limit"
    with pytest.raises(openai.NotFoundError, match="after=msg_x"):
        ai.responses.input_items.list(second.id, after="msg_x")
    with pytest.raises(openai.NotFoundError, match="not stored"):
        ai.responses.input_items.list("resp_x")


def test_only_a_response_in_the_background_can_be_cancelled(ai) -> None:
    response = ai.responses.create(model="tiny", input="Hello", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="background=true"):
        ai.responses.cancel(response.id)
    with pytest.raises(openai.NotFoundError, match="not stored"):
        ai.responses.cancel("resp_x")


def test_thoughts_of_earlier_items_reach_the_template(play, folder: Path) -> None:
    ai, engine = play(THOUGHTS)
    response = ai.responses.create(model="thinker", input="Is it raining?")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    items = [item.model_dump() for item in response.output]
    ai.responses.create(model="thinker", input=[*items, {"role": "user", "content": "Sure?"}])
    assert "<think>\nLet me look.\nOutside.\n</think>\n\nIt is dry.\nuser: Sure?" in rendered(folder, engine)


def test_what_is_not_stored_cannot_be_continued(ai) -> None:
    response = ai.responses.create(model="tiny", input="Hello", max_output_tokens=2, store=False)
    with pytest.raises(openai.NotFoundError) as raised:
        ai.responses.create(model="tiny", input="So?", previous_response_id=response.id)
    assert raised.value.param == "previous_response_id"
    stored = ai.responses.create(model="tiny", input="Hello", max_output_tokens=2)
    ai.responses.delete(stored.id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(stored.id)


@pytest.mark.parametrize(
    "field",
    [
        '"metadata": {"a": "\\ud800"}',
        '"metadata": {"a": NaN}',
        '"input": [{"type": "reasoning", "summary": []}]',
        '"input": [{"type": "function_call", "name": "f"}]',
    ],
)
def test_what_the_answer_could_not_repeat_is_refused(field: str, client) -> None:
    content = '{"input": "x", "max_output_tokens": 1, ' + field + "}"
    reply = client.post("/v1/responses", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 422, reply.text


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("input", {"input": []}),
        ("tools.0.type", {"tools": [{"type": "web_search"}]}),
        ("max_output_tokens", {"max_output_tokens": 10_000}),
        ("text.format", {"text": {"format": {"type": "yaml"}}}),
        ("truncation", {"truncation": "auto"}),
        ("conversation", {"extra_body": {"conversation": "conv_1"}}),
        ("include.0", {"include": ["message.output_text.logprobs"]}),
        (
            "input.0.content.0.type",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        ),
        ("tool_choice.tools", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {**ALLOWED, "tools": [{"type": "function", "name": "x"}]}}),
    ],
)
def test_a_wrong_field_is_named(param: str, options: dict, ai) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        ai.responses.create(**{"model": "tiny", "input": "Hello", **options})
    assert raised.value.param == param


def test_what_clients_send_without_effect_is_taken(ai) -> None:
    options = {"model": "tiny", "input": "Hello", "max_output_tokens": 2, "temperature": 0}
    plain = ai.responses.create(**options)
    harmless = {
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "max_tool_calls": 3,
        "safety_identifier": "x",
        "reasoning": {"summary": "auto"},
        "text": {"verbosity": "medium"},
    }
    assert ai.responses.create(**options, **harmless).output_text == plain.output_text
    stream = ai.responses.create(**options, stream=True, stream_options={"include_obfuscation": False})
    assert list(stream)[-1].response.output_text == plain.output_text
    assert ai.responses.input_tokens.count(model="tiny", input="Hello").input_tokens == plain.usage.input_tokens
    after = {"previous_response_id": plain.id, "input": "So?"}
    counted = ai.responses.input_tokens.count(model="tiny", **after).input_tokens
    assert counted == ai.responses.create(**{**options, **after}).usage.input_tokens


def test_a_failure_in_a_stream_is_its_last_event(play) -> None:
    ai, _ = play(["a", "b"], "error")
    error, failed = list(ai.responses.create(model="thinker", input="Hello", stream=True))[-2:]
    assert (error.type, failed.type, failed.response.status) == ("error", "response.failed", "failed")
    assert "the log has the reason" in error.message
    assert "the log has the reason" in failed.response.error.message


def test_the_memory_is_bounded_and_each_client_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from genai_pl.serving.fair_queue import CLIENT

    memory = ResponseMemory(60_000)
    for n in range(40):
        memory.put({"id": f"r{n}"}, [Message(role="user", content="x")])
    assert memory.n_bytes == sum(entry.size for entry in memory.entries.values()) <= 60_000
    assert 1 < len(memory.entries) < 40
    assert memory.get("r39").response == {"id": "r39"}
    memory.put({"id": "large"}, [Message(role="user", content="x" * 60_000)])
    with pytest.raises(ApiError, match="not stored"):
        memory.get("large")
    token = CLIENT.set("another")
    with pytest.raises(ApiError, match="not stored"):
        memory.get("r39")
    CLIENT.reset(token)


def test_a_chat_has_thoughts_beside_its_content(play) -> None:
    ai, _ = play(THOUGHTS)
    options = {"model": "thinker", "messages": [{"role": "user", "content": "Is it raining?"}]}
    message = ai.chat.completions.create(**options).choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me look.\nOutside.", "It is dry.")
    deltas = [
        c.delta.model_dump() for chunk in ai.chat.completions.create(**options, stream=True) for c in chunk.choices
    ]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == message.reasoning_content
    assert "".join(delta["content"] or "" for delta in deltas) == "It is dry."
