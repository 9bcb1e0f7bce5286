"""Calls, tools and reasoning under chat templates that differ in where and how they write them."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from genai_pl.data import byte_tokenizer
from genai_pl.data.chat_template import ChatTemplate
from genai_pl.data.prompt_tokens import encode_messages, encode_prompt
from genai_pl.errors import DataError
from tests.data.test_chat_templates import CALL, PATHS, TOOL, answer, learned, tokenizer_of, transformers_ids, user

ADD = {"id": "abcdefgh2", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, True]}}}
ADD_TOOL = {**TOOL, "function": {**TOOL["function"], "name": "add"}}
TOOLS = [TOOL, ADD_TOOL]
FOUND = {"role": "tool", "content": "31 degrees", "name": "look_up", "tool_call_id": "abcdefghi"}
ADDED = {"role": "tool", "content": "3 in all", "name": "add", "tool_call_id": "abcdefgh2"}
TWO_CALLS = [user("Weather?"), answer("", tool_calls=[CALL, ADD]), FOUND, ADDED, answer("Hot.")]
LATER = [user("Weather?"), answer("", tool_calls=[CALL]), FOUND, answer("Hot."), user("Thanks"), answer("Welcome.")]
# as Mistral's: tools stand before the last question, and nothing asks for an answer
TOOLS_LAST = (
    "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == last %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
    "{% elif m.tool_calls %}[CALLS]{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# as Hermes': its prompt has a list of tools in any case
TOOLS_ALWAYS = (
    "<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# as Qwen3's and many of its time: reasoning under one key, and of the last turn alone
REASONS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content and loop.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
def test_several_calls_of_a_turn_are_learned_whole_and_no_answer_of_a_tool_is() -> None:
    n_learned = 0
    for path in (path for path in PATHS if not path.stem.endswith("_training")):
        tokenizer = tokenizer_of(path)
        try:
            example = encode_messages(tokenizer, TWO_CALLS, TOOLS)
        except DataError:  # no tools, or one call a turn
            continue
        n_learned += 1
        ids = transformers_ids(tokenizer, TWO_CALLS, tools=TOOLS)
        assert example.input_ids[: len(ids)].tolist() == ids, path.stem  # and an end token where none closes the turn
        calls, last = learned(tokenizer, example)
        assert calls.index("look_up") < calls.index("Paris") < calls.index("add") < calls.index("2.5"), path.stem
        assert "Hot." in last
        assert not any(text in calls + last for text in ("Weather?", "31 degrees", "3 in all")), path.stem
    assert n_learned > 15


@pytest.mark.parametrize("talk", [TWO_CALLS, LATER], ids=["two calls", "a later turn"])
def test_calls_are_found_where_tools_move_with_the_last_question(talk: list[dict]) -> None:
    tokenizer = tokenizer_with(TOOLS_LAST)
    example = encode_messages(tokenizer, talk, TOOLS)
    assert example.input_ids.tolist() == transformers_ids(tokenizer, talk, tools=TOOLS)
    calls = talk[1]["tool_calls"]
    written = "[CALLS]" + "".join(json.dumps(call["function"]) for call in calls) + "</s>"
    texts = [m["content"] + "</s>" for m in talk[2:] if m["role"] == "assistant"]
    assert learned(tokenizer, example) == [written, *texts]


def test_a_template_that_needs_tools_reads_contents_as_texts() -> None:
    tokenizer = tokenizer_with(TOOLS_ALWAYS)
    assert not ChatTemplate(tokenizer).needs_parts
    example = encode_messages(tokenizer, TWO_CALLS, TOOLS)
    assert example.input_ids.tolist() == transformers_ids(tokenizer, TWO_CALLS, tools=TOOLS)
    with pytest.raises(DataError, match="refuses a conversation"):  # as it does in transformers
        encode_messages(tokenizer, [user("Hi"), answer("Hello.")])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_the_key_that_it_reads(key: str) -> None:
    tokenizer = tokenizer_with(REASONS)
    talk = [user("Five?"), answer("Eight.", **{key: "hm"}), user("And?"), answer("Nine.", **{key: "so"})]
    expected = [{k.replace(key, "reasoning_content"): v for k, v in message.items()} for message in talk]
    example = encode_messages(tokenizer, talk)
    assert example.input_ids.tolist() == transformers_ids(tokenizer, expected)
    assert learned(tokenizer, example) == ["Eight.</s>", "<think>so</think>Nine.</s>"]  # earlier ones leave, by design


def test_reasoning_that_a_template_has_no_place_for_is_refused() -> None:
    tokenizer = tokenizer_with(REASONS.replace("reasoning_content", "other"))
    with pytest.raises(DataError, match=r"no place for the reasoning of turn 2; .* or leave out thinking"):
        encode_messages(tokenizer, [user("Five?"), answer("Eight.", thinking="hm")])
    # before a question it is no target: most templates leave it out there
    assert encode_prompt(tokenizer, [user("Five?"), answer("Eight.", thinking="hm"), user("And?")]).size


def test_a_tool_whose_name_is_not_printed_is_refused() -> None:
    tokenizer = tokenizer_with(TOOLS_ALWAYS.replace("t | tojson", "t.name or 'some'"))
    with pytest.raises(DataError, match="tools: the chat template leaves out look_up"):
        encode_prompt(tokenizer, [user("Weather?")], [TOOL])


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
@pytest.mark.parametrize("path", [p for p in PATHS if p.stem in ("qwen3", "gptoss", "glm4moe")], ids=lambda p: p.stem)
def test_reasoning_beside_a_call_is_learned_with_it(path: Path) -> None:
    tokenizer = tokenizer_of(path)
    talk = [user("Weather?"), answer("", tool_calls=[CALL], reasoning_content="I must look.")]
    [text] = learned(tokenizer, encode_messages(tokenizer, talk, [TOOL]))
    assert text.index("I must look.") < text.index("look_up") < text.index("Paris")
