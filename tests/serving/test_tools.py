"""Tools in a chat: the template gets them, and calls are parsed out of the answer."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="needs pip install openai")
pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from tests.serving.fake import FakeEngine, playing
from tests.serving.servers import make_service, serving, write_model

# as those of Hermes and Qwen, in short
TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKED = [{"role": "user", "content": "Is it raining?"}]
CALLS = ["Let me see. <tool_", 'call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n', "</tool_call>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("models") / "caller", template=False, max_seq_len=512)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def play(folder: Path) -> "Iterator[Callable[[list[str]], tuple[openai.OpenAI, FakeEngine]]]":
    """A client of a server whose fake engine generates the texts."""
    with playing(folder, lambda url: openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)) as start:
        yield start


def rendered_prompt(folder: Path, engine: FakeEngine) -> tuple[str, object]:
    """The prompt as text, and the tokenizer of transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode(engine.requests[-1].input_ids), tokenizer


def test_a_call_is_read_whole_and_in_a_stream(folder: Path, play) -> None:
    ai, engine = play(CALLS)
    options = {"model": "caller", "messages": ASKED, "tools": [TOOL]}
    choice = ai.chat.completions.create(**options).choices[0]
    text, tokenizer = rendered_prompt(folder, engine)
    rendered = {"tokenize": False, "add_generation_prompt": True}
    assert text == tokenizer.apply_chat_template(ASKED, tools=[TOOL], **rendered)
    assert '"name": "weather"' in text
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Zürich"}

    chunks = list(ai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage.completion_tokens == 3
    [streamed] = [call for chunk in chunks for c in chunk.choices for call in c.delta.tool_calls or []]
    assert (streamed.index, streamed.function.model_dump()) == (0, call.function.model_dump())
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["tool_calls"]

    turns = [*ASKED, choice.message.model_dump(exclude_none=True)]
    turns.append({"role": "tool", "tool_call_id": call.id, "content": "It is dry."})
    ai.chat.completions.create(model="caller", messages=turns, tools=[TOOL])
    text, _ = rendered_prompt(folder, engine)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>' in text
    assert "tool: It is dry." in text


@pytest.mark.parametrize(
    "text",
    [
        "It is dry.",
        "<tool_call>{broken</tool_call>",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": "Zürich"}</tool_call>',
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "weather"',
        '<tool_call>{"name": "weather", "arguments": {"city": NaN}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>',
    ],
)
def test_what_is_no_call_stays_text(text: str, play) -> None:
    ai, _ = play([text])
    choice = ai.chat.completions.create(model="caller", messages=ASKED, tools=[TOOL]).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")


def test_tools_that_may_not_be_called_are_not_told(folder: Path, play) -> None:
    ai, engine = play(CALLS)
    answer = ai.chat.completions.create(model="caller", messages=ASKED, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content == "".join(CALLS)
    assert "weather" not in rendered_prompt(folder, engine)[0]


def test_half_a_character_in_what_is_rendered_is_refused(play) -> None:
    ai, _ = play(CALLS)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "\\ud800"}'}}
    turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(openai.UnprocessableEntityError, match="not JSON"):
        ai.chat.completions.create(model="caller", messages=turns, tools=[TOOL])
    half = {"type": "function", "function": {"name": "weather", "description": "\ud800"}}
    raw = json.dumps({"messages": ASKED, "tools": [half]})
    reply = httpx.post(f"{ai.base_url}chat/completions", content=raw, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "tools.0")
    call["function"]["arguments"] = "{broken"
    with pytest.raises(openai.UnprocessableEntityError, match="not JSON"):
        ai.chat.completions.create(model="caller", messages=turns, tools=[TOOL])


@pytest.mark.parametrize(
    ("param", "options"),
    [
        ("tool_choice", {"tool_choice": "perhaps"}),
        ("tool_choice", {"tool_choice": "required", "tools": []}),
        ("tool_choice", {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "other"}}}),
        (
            "tools.0.function",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}], "tool_choice": "required"},
        ),
        ("tools.0.function.name", {"tools": [{"type": "function", "function": {}}]}),
        ("messages.0", {"messages": [{"role": "assistant"}]}),
    ],
)
def test_what_cannot_be_is_refused_by_name(param: str, options: dict, play) -> None:
    ai, _ = play(CALLS)
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        ai.chat.completions.create(**{"model": "caller", "messages": ASKED, "tools": [TOOL], **options})
    assert raised.value.param == param


ADD = {"type": "function", "function": {"name": "add"}}
ADD_ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [ADD]}}


@pytest.mark.parametrize("choice", ["required", ADD, ADD_ALLOWED])
def test_a_call_that_must_be_is_one_of_an_offered_tool(folder: Path, choice) -> None:
    pytest.importorskip("llguidance", reason="needs pip install -e '.[constrain]'")
    reference = {"$defs": {"small": {"type": "integer", "enum": [1, 2]}}, "type": "object", "required": ["a"]}
    reference |= {"properties": {"a": {"$ref": "#/$defs/small"}}, "additionalProperties": False}
    add = {"type": "function", "function": {"name": "add", "parameters": reference}}
    tools = [add] if choice == "required" else [TOOL, add]
    with serving(make_service(folder, cache=None)) as client:
        asked = {"messages": ASKED, "tools": tools, "tool_choice": choice, "temperature": 0, "max_tokens": 100}
        asked["logit_bias"] = dict.fromkeys(map(str, b"\n\t\r"), -100) | {"32": 100}  # a space wherever it may be
        [whole] = client.post("/v1/chat/completions", json=asked).json()["choices"]
        assert (whole["finish_reason"], whole["message"]["content"]) == ("tool_calls", None)
        [call] = whole["message"]["tool_calls"]
        assert call["function"]["name"] == "add"
        assert json.loads(call["function"]["arguments"])["a"] in (1, 2)
        short = client.post("/v1/chat/completions", json={**asked, "max_tokens": 5}).json()["choices"][0]
        assert (short["finish_reason"], "tool_calls" in short["message"]) == ("length", False)


def test_names_and_thoughts_of_earlier_turns_reach_the_template() -> None:
    from genai_pl.serving.http.messages import Message

    said = Message(role="assistant", content="It is.", reasoning_content="hm", thinking=None)
    assert said.plain() == {"role": "assistant", "content": "It is.", "reasoning_content": "hm"}
    told = Message(role="tool", content="dry", name="weather", tool_call_id="call_1")
    assert told.plain() == {"role": "tool", "content": "dry", "name": "weather", "tool_call_id": "call_1"}
