"""Anthropic's Python client against the server: messages, streams, tools, thoughts, token counts and errors."""
# ruff: noqa: E402 (what is imported below needs what is asked for first)

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

anthropic = pytest.importorskip("anthropic", reason="needs pip install anthropic")
pytest.importorskip("fastapi", reason="needs pip install -e '.[serve]'")

from tests.serving.fake import playing
from tests.serving.servers import make_service, serving
from tests.serving.thinking import CALLS, THOUGHTS, write_thinking_model

TOOL = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ASKED = [{"role": "user", "content": "Is it raining?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_thinking_model(tmp_path_factory.mktemp("models") / "thinker")


@pytest.fixture(scope="module")
def served(tiny: Path) -> "Iterator[anthropic.Anthropic]":
    """A client of the tiny model, with a key."""
    with serving(make_service(tiny), keys=("secret",)) as client, ExitStack() as stack:
        yield stack.enter_context(anthropic.Anthropic(base_url=str(client.base_url), api_key="secret", max_retries=0))


@pytest.fixture
def play(folder: Path):
    """A client of a server whose fake engine generates the texts."""
    with playing(folder, lambda url: anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)) as start:
        yield start


def test_a_message_is_the_models_answer_whole_and_in_a_stream(served, tiny: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"model": "tiny", "max_tokens": 8, "system": "Be brief.", "messages": ASKED}
    message = served.messages.create(**options)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [{"role": "system", "content": "Be brief."}, *ASKED]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tiny).generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=8, do_sample=False
        )
    expected = tokenizer.decode(theirs[0, len(ids) :], skip_special_tokens=True).rstrip("\ufffd")
    assert (message.type, message.role, message.stop_reason) == ("message", "assistant", "max_tokens")
    assert [block.text for block in message.content] == [expected]
    assert (message.usage.input_tokens, message.usage.output_tokens) == (len(ids), 8)
    counted = served.messages.count_tokens(**{k: options[k] for k in ("model", "system", "messages")})
    assert counted.input_tokens == len(ids)

    with served.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert (final.content[0].text, final.stop_reason) == (expected, "max_tokens")
    assert (final.usage.input_tokens, final.usage.output_tokens) == (len(ids), 8)


def test_tokens_of_the_prefix_cache_are_told_apart(folder: Path) -> None:
    options = {"model": "thinker", "max_tokens": 4, "messages": ASKED}
    with serving(make_service(folder, cache=None)) as client:
        ai = anthropic.Anthropic(base_url=str(client.base_url), api_key="none", max_retries=0)
        total = ai.messages.count_tokens(model="thinker", messages=ASKED).input_tokens
        first = ai.messages.create(**options).usage
        assert (first.input_tokens, first.cache_read_input_tokens) == (total, 0)
        again = ai.messages.create(**options).usage
        with ai.messages.stream(**options) as stream:
            streamed = stream.get_final_message().usage
        for usage in (again, streamed):  # all whole blocks but the last token, which must be read for its logits
            assert usage.cache_read_input_tokens == (total - 1) // 16 * 16 > 0
            assert usage.input_tokens + usage.cache_read_input_tokens == total
        # OpenAI counts them as part of the prompt
        response = client.post("/v1/responses", json={"input": ASKED, "max_output_tokens": 2, "temperature": 0}).json()
        assert response["usage"]["input_tokens"] == total
        assert response["usage"]["input_tokens_details"] == {"cached_tokens": again.cache_read_input_tokens}


def test_a_stop_sequence_is_named(served) -> None:
    options = {"model": "tiny", "max_tokens": 8, "messages": ASKED}
    text = served.messages.create(**options).content[0].text
    message = served.messages.create(**options, stop_sequences=["\x00 never", text[2:4]])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", text[2:4])
    assert "".join(block.text for block in message.content) == text[: text.find(text[2:4])]


def test_calls_and_results_go_both_ways(play, folder: Path) -> None:
    from transformers import AutoTokenizer

    ai, engine = play(CALLS)
    options = {"model": "thinker", "max_tokens": 50, "messages": ASKED, "tools": [TOOL]}
    message = ai.messages.create(**options)
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert (message.content[0].text, message.stop_reason) == ("Let me see.", "tool_use")
    call = message.content[1]
    assert (call.name, call.input) == ("weather", {"city": "Zürich"})
    with ai.messages.stream(**options) as stream:
        streamed = stream.get_final_message()
    assert (streamed.content[1].name, streamed.content[1].input) == ("weather", {"city": "Zürich"})
    assert streamed.stop_reason == "tool_use"

    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "It is dry."}]}
    turns = [
        *ASKED,
        {"role": "assistant", "content": [block.model_dump() for block in message.content]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    turns[1]["content"] = [{k: v for k, v in block.items() if v is not None} for block in turns[1]["content"]]
    ai.messages.create(**{**options, "messages": turns})
    rendered = AutoTokenizer.from_pretrained(folder).decode(engine.requests[-1].input_ids)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Zürich"}}</tool_call>' in rendered
    assert "tool: It is dry.\nuser: So?" in rendered


def test_thoughts_are_a_block_of_their_own_if_asked_for(play) -> None:
    ai, _ = play(THOUGHTS)
    options = {"model": "thinker", "max_tokens": 2000, "messages": ASKED}
    plain = ai.messages.create(**options)
    assert [(block.type, block.text) for block in plain.content] == [("text", "It is dry.")]
    options["thinking"] = {"type": "enabled", "budget_tokens": 1024}
    shown = ai.messages.create(**options)
    assert [block.type for block in shown.content] == ["thinking", "text"]
    assert shown.content[0].thinking == "Let me look.\nOutside."
    with ai.messages.stream(**options) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert (final.content[0].thinking, final.content[1].text) == ("Let me look.\nOutside.", "It is dry.")


def test_an_answer_follows_a_schema(served) -> None:
    import json

    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["yes"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    options = {"model": "tiny", "max_tokens": 64, "messages": ASKED, "cache_control": {"type": "ephemeral"}}
    options["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
    message = served.messages.create(**options)
    assert json.loads(message.content[0].text) == {"a": "yes"}
    options["output_config"] = {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format: Invalid type: objekt"):
        served.messages.create(**options)


def test_errors_have_the_shape_of_this_api(served, play) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is tiny") as raised:
        served.messages.create(model="other", max_tokens=1, messages=ASKED)
    body = raised.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "not_found_error")
    assert body["request_id"] == raised.value.response.headers["x-request-id"]
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        served.messages.create(model="tiny", max_tokens=0, messages=ASKED)
    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    with pytest.raises(anthropic.BadRequestError, match="image"):
        served.messages.create(model="tiny", max_tokens=1, messages=[{"role": "user", "content": [image]}])
    turns = [*ASKED, {"role": "assistant", "content": "It"}]
    with pytest.raises(anthropic.BadRequestError, match="begun answer"):
        served.messages.create(model="tiny", max_tokens=1, messages=turns)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    with pytest.raises(anthropic.BadRequestError, match="no thoughts"):
        served.messages.create(model="tiny", max_tokens=1, messages=ASKED, thinking=thinking)
    with pytest.raises(anthropic.AuthenticationError, match="key"):
        served.with_options(api_key="wrong").messages.create(model="tiny", max_tokens=1, messages=ASKED)
    ai, _ = play(["a", "b"], "error")
    with pytest.raises(anthropic.InternalServerError, match="failed"):
        ai.messages.create(model="thinker", max_tokens=5, messages=ASKED)
    with pytest.raises(anthropic.APIStatusError, match="failed"):
        list(ai.messages.create(model="thinker", max_tokens=5, messages=ASKED, stream=True))
