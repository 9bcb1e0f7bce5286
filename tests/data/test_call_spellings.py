"""Calls and roles as people write them: one form leaves the parser, and what has none is refused with its row."""

import json

import pytest

from genai_pl.data.columns import Place
from genai_pl.data.messages import parse_messages
from genai_pl.data.prompt_tokens import encode_messages, encode_prompt
from genai_pl.data.tool_schemas import parse_tools
from genai_pl.errors import DataError
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.messages import Message
from tests.data.test_chat_templates import PATHS, TOOL, answer, tokenizer_of, transformers_ids, user

HERE = Place("here.jsonl", 3, "messages")
WANTED = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def parsed(**turn: object) -> dict[str, object]:
    (message,) = parse_messages([{"role": "assistant", **turn}], HERE)
    return message


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"tool_calls": [{"type": None, "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"function": {"name": "add", "arguments": json.dumps('{"a": 1}')}}]},
        {"tool_calls": json.dumps([WANTED]), "content": None},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": None},
        {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": "", "tool_calls": []},
    ],
)
def test_a_call_has_the_form_of_openai_however_it_is_written(turn: dict) -> None:
    assert parsed(**turn) == {"role": "assistant", "content": "", "tool_calls": [WANTED]}


@pytest.mark.parametrize("given", [{}, {"arguments": None}, {"arguments": ""}, {"arguments": "{}"}])
def test_a_call_without_arguments_has_an_empty_object(given: dict) -> None:
    (call,) = parsed(tool_calls=[{"function": {"name": "now", **given}}])["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("given", ["{a: 1}", [1], 3, "[1]", '"a"'])
def test_arguments_that_are_no_object_are_refused_by_data_and_by_the_server(given: object) -> None:
    with pytest.raises(DataError, match=r"row 3.*the arguments of a call are an object, or its JSON text, not"):
        parsed(tool_calls=[{"function": {"name": "add", "arguments": given}}])
    if isinstance(given, str):
        call = {"id": "c1", "function": {"name": "add", "arguments": given}}
        with pytest.raises(ApiError, match="the arguments of a call are no"):
            Message(role="assistant", tool_calls=[call]).plain()


def test_the_server_reads_calls_and_roles_as_data_do() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    for message in ({"role": "assistant", "tool_calls": [call]}, {"role": "developer", "content": "Be brief."}):
        assert parse_messages([message], HERE) == [Message(**message).plain()]
    assert parse_messages([{"role": "function", "name": "now", "content": "3"}], HERE)[0]["role"] == "tool"


def test_an_empty_list_of_calls_is_none() -> None:
    assert parsed(content="Hi", tool_calls=[]) == {"role": "assistant", "content": "Hi"}
    assert parsed(content=None, tool_calls=[], reasoning="so")["content"] == ""
    assert parse_tools("null", HERE) == parse_tools("[]", HERE) == []


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
def test_a_second_call_of_the_same_tool_is_learned_or_the_row_is_refused() -> None:
    calls = [{"id": f"abcdefgh{n}", "type": "function", "function": {"name": "look_up", "arguments": {"city": city}}}
             for n, city in enumerate(("Paris", "Rome"))]  # fmt: skip
    talk = [user("Weather?"), answer("", tool_calls=calls)]
    n_learned, refused = 0, []
    for path in (path for path in PATHS if path.stem in ("gptoss", "qwen3", "glm4moe", "llama3_1", "qwen3_6")):
        tokenizer = tokenizer_of(path)
        try:
            example = encode_messages(tokenizer, talk, [TOOL])
        except DataError as error:
            refused.append(f"{path.stem}: {error}")
            continue
        n_learned += 1
        ids = transformers_ids(tokenizer, talk, tools=[TOOL])
        assert example.input_ids[: len(ids)].tolist() == ids, path.stem
        assert "Rome" in tokenizer.decode(example.input_ids[example.loss_mask]), path.stem
    assert n_learned == 3
    assert refused[0] == (
        "gptoss: messages: the chat template leaves out a call in turn 2 (assistant): give each call a turn of its own"
    )
    results = [{"role": "tool", "content": "sun", "tool_call_id": call["id"], "name": "look_up"} for call in calls]
    with pytest.raises(DataError, match="leaves out a call in turn 2"):
        encode_prompt(tokenizer_of(next(path for path in PATHS if path.stem == "gptoss")), [*talk, *results], [TOOL])
