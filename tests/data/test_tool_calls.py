"""Calls in answers, in each format that chat templates write: what a template renders is parsed back."""

import json

import pytest

from genai_pl.data.chat_template import ChatTemplate
from genai_pl.data.tool_calls import JSON_FORMAT, Call, CallReader, call_format
from tests.data.test_chat_templates import CALL, PATHS, TOOL, answer, tokenizer_of, user
from tests.data.test_tool_templates import tokenizer_with

SAY = {"name": "say", "arguments": {"words": 'x "y"\n1', "n": 2, "list": [1.5, True]}}
PROPERTIES = {"words": {"type": "string"}, "n": {"type": "integer"}, "list": {"type": "array"}}
SAY_TOOL = {"name": "say", "description": "Says.", "parameters": {"type": "object", "properties": PROPERTIES}}
TOOLS = [TOOL, {"type": "function", "function": SAY_TOOL}]
LOOK_UP, SAYS = Call("look_up", {"city": "Paris"}), Call("say", SAY["arguments"])
# formats of templates that TRL does not ship, in short: Mistral's of two years
HEAD = "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
TAIL = "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
LISTED = (
    HEAD + "{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | map(attribute='function') | list | tojson }}</s>" + TAIL
)
NAMED = (
    HEAD + "{% if m.tool_calls %}{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]"
    "{{ c.function.arguments | tojson }}{% endfor %}</s>" + TAIL
)


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
def test_calls_that_a_template_of_trl_renders_are_parsed_back() -> None:
    known = set()
    for path in (path for path in PATHS if not path.stem.endswith("_training")):
        tokenizer = tokenizer_of(path)
        reader, template = CallReader(tokenizer), ChatTemplate(tokenizer)
        if call_format(template) is None:
            continue
        known.add(path.stem)
        for calls, expected in (([CALL], [LOOK_UP]), ([{"function": SAY}], [SAYS])):
            calls = [{"id": f"abcdefgh{n}", "type": "function", **call} for n, call in enumerate(calls)]
            rendering = template.render_with_spans([user("Weather?"), answer("", tool_calls=calls)], tools=TOOLS)
            ids = tokenizer(rendering.text[slice(*rendering.spans[-1])], add_special_tokens=False)["input_ids"]
            found = reader.read(tokenizer.decode(ids, skip_special_tokens=True), ids, TOOLS)[1]
            assert found == expected, path.stem
    assert {"qwen2_5", "qwen3", "qwen3_8", "llama3_1", "llama3_2", "gptoss", "glm4moe", "nemotron_3_nano"} <= known


@pytest.mark.parametrize("template", [LISTED, NAMED], ids=["listed", "named"])
def test_calls_of_mistral_are_read_from_the_tokens_that_a_text_lacks(template: str) -> None:
    tokenizer = tokenizer_with(template)
    tokenizer.add_tokens(["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"], special_tokens=True)
    reader = CallReader(tokenizer)
    calls = [CALL, {"id": "abcdefgh2", "type": "function", "function": SAY}]
    rendering = reader.template.render_with_spans([user("Weather?"), answer("", tool_calls=calls)], tools=TOOLS)
    ids = tokenizer(rendering.text[slice(*rendering.spans[-1])], add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "[TOOL_CALLS]" not in text
    assert reader.read(text, ids, TOOLS) == ("", [LOOK_UP, SAYS])
    assert len(reader.call_id()) == 9  # templates of Mistral refuse other ids
    plain = tokenizer("It is dry.")["input_ids"]
    assert reader.read("It is dry.", plain, TOOLS) == ("It is dry.", [])


def test_gpt_oss_calls_in_the_order_that_the_model_writes() -> None:
    form = next(f for f in map(call_format, map(ChatTemplate, map(tokenizer_of, gpt_oss()))) if f)
    written = (
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.look_up "
        '<|constrain|>json<|message|>{"city": "Paris"}'
    )
    assert form.parse(written, TOOLS)[1] == [LOOK_UP]


def gpt_oss() -> list:
    return [path for path in PATHS if path.stem == "gptoss"] or pytest.skip("trl is not installed")


@pytest.mark.parametrize(
    ("inner", "error"),
    [
        ('{"name": "add"', "not JSON"),
        ("", "empty"),
        ('["add"]', "an object with a name"),
        ('{"name": "add", "arguments": [1]}', "not an object"),
        ('{"name": "add", "arguments": "{"}', "arguments are not JSON"),
    ],
)
def test_a_call_that_cannot_be_read_says_why(inner: str, error: str) -> None:
    text, [call] = JSON_FORMAT.parse(f"Wait. <tool_call>{inner}</tool_call>", [])
    assert text == "Wait."
    assert error in call.error


def test_many_calls_are_all_read_and_the_text_around_them_stays() -> None:
    call = '<tool_call>\n {"name": "a", "arguments": {"n": 1}} </tool_call>'
    text, calls = JSON_FORMAT.parse(f"x {call} y {call} z", [])
    assert text == "x  y  z"
    assert calls == [Call("a", {"n": 1})] * 2
    both = f"<tool_call>{json.dumps([{'name': 'a', 'arguments': {'n': 1}}] * 2)}</tool_call>"
    assert JSON_FORMAT.parse(both, []) == ("", calls)
