"""What is learned of conversations under the chat templates that TRL ships, against transformers and TRL's own masks."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from genai_pl.data import byte_tokenizer, train_bpe
from genai_pl.data.prompt_tokens import TokenizedExample, encode_messages, encode_prompt, ensure_template
from genai_pl.errors import DataError
from tests.conftest import some

spec = find_spec("trl")
FOLDER = Path(spec.origin).parent / "chat_templates" if spec else Path("missing")
PATHS = sorted(FOLDER.glob("*.jinja"))
MARKS = re.compile(
    r"<\|[a-zA-Z_0-9]+\|?>|<[a-z_]+\|>|<[\uff5ca-zA-Z▁_]+\uff5c>|<(?:start|end)_of_[a-z]+>|</?s>|\[/?INST\]"
)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris"}}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Finds.", "parameters": CITY}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
TALKS = {
    "one turn": [user("Five and three?"), answer("Eight.")],
    "two turns": [user("Five and three?"), answer("Eight."), user("And one?"), answer("Nine.")],
    "system": [SYSTEM, user("Five and three?"), answer("Eight."), user("And one?"), answer("Nine.")],
    "four turns": [m for n in range(4) for m in (user(f"Q{n} naïve?"), answer(f"Answer {n}, naïve."))],
    "thoughts": [
        user("Five?"),
        answer("<think>\nhm\n</think>\n\nEight."),
        user("And?"),
        answer("<think>\nso\n</think>\n\nNine."),
    ],
    "reasoning": [
        user("Five?"),
        answer("Eight.", reasoning_content="hm", thinking="hm"),
        user("And?"),
        answer("Nine.", reasoning_content="so", thinking="so"),
    ],
    "brackets": [user("Five?"), answer("<b>Eight.</b>"), user("<x> And?"), answer("<i>Nine.")],
    "tools": [
        user("Weather?"),
        answer("", tool_calls=[CALL]),
        {"role": "tool", "content": "sunny", "name": "look_up", "tool_call_id": "abcdefghi"},
        answer("Sunny."),
        user("Thanks"),
        answer("Welcome."),
    ],
    "assistant first": [answer("Hello!"), user("Hi"), answer("Bye.")],
}


def tokenizer_of(path: Path) -> PreTrainedTokenizerBase:
    """A byte tokenizer with the template and its markers as special tokens."""
    tokenizer, template = byte_tokenizer(), path.read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_tokens(sorted(set(MARKS.findall(template))), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample) -> list[str]:
    """The texts of the runs of tokens that are learned."""
    return runs(tokenizer, example.input_ids.tolist(), example.loss_mask.tolist())


def runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[int]) -> list[str]:
    found: list[list[int]] = []
    for n, (token, is_learned) in enumerate(zip(ids, mask, strict=True)):
        if is_learned and not (n and mask[n - 1]):
            found.append([])
        if is_learned:
            found[-1].append(token)
    return [tokenizer.decode(run) for run in found]


def transformers_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: object) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def in_parts(messages: list[dict]) -> list[dict]:
    """As templates of models that see pictures want them."""
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def as_read(path: Path, messages: list[dict]) -> list[dict]:
    """The conversation as the template wants it: with parts, or with arguments of calls as text."""
    if path.stem.removesuffix("_training") in ("idefics3", "smolvlm", "llava_next"):
        return in_parts(messages)
    if path.stem == "deepseekv3":
        text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
        return [{**m, "tool_calls": [text]} if "tool_calls" in m else m for m in messages]
    return messages


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
@pytest.mark.parametrize("path", some(PATHS), ids=lambda path: path.stem)
def test_answers_and_their_ends_alone_are_learned_from_the_tokens_of_transformers(path: Path) -> None:
    tokenizer, n_refused = tokenizer_of(path), 0
    for name, messages in TALKS.items():
        tools = [TOOL] if name == "tools" else []
        try:
            example = encode_messages(tokenizer, messages, tools)
        except DataError:
            n_refused += 1
            continue
        ids = transformers_ids(tokenizer, as_read(path, messages), tools=tools or None)
        assert example.input_ids[: len(ids)].tolist() == ids
        assert example.input_ids[len(ids) :].tolist() in (
            [],
            [tokenizer.eos_token_id],
        )  # where a template closes nothing
        said = [m for m in messages if m["role"] == "assistant"]
        texts = learned(tokenizer, example)
        assert len(texts) == len(said)
        for text, message in zip(texts, said, strict=True):
            assert (message["content"].split("\n")[-1] or "Paris") in text
            assert not any(m["content"] in text for m in messages if m["role"] != "assistant")
            assert message["content"] == "" or not text.startswith(("<|im_start|>", "<|start_header_id|>", "[INST]"))
        for n, message in enumerate(messages):
            if message["role"] == "assistant" and n:
                check_prompt(path, tokenizer, messages[:n], tools)
    assert n_refused <= 4  # roles or calls that the template does not know


def check_prompt(path: Path, tokenizer: PreTrainedTokenizerBase, messages: list[dict], tools: list[dict]) -> None:
    """A model is prompted with the tokens that transformers makes."""
    options = {"add_generation_prompt": True, "tools": tools or None}
    try:
        expected = transformers_ids(tokenizer, as_read(path, messages), **options)
    except Exception:  # a template that raises its own error
        with pytest.raises(DataError):
            encode_prompt(tokenizer, messages, tools)
        return
    assert encode_prompt(tokenizer, messages, tools).tolist() == expected


PAIRS = [(path, FOLDER / f"{path.stem}_training.jinja") for path in PATHS]
PAIRS = [pair for pair in PAIRS if pair[1].exists()]


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
@pytest.mark.parametrize(("path", "marked"), PAIRS, ids=lambda path: path.stem)
def test_what_is_learned_is_what_trl_marks_for_training(path: Path, marked: Path) -> None:
    tokenizer, theirs = tokenizer_of(path), tokenizer_of(marked)
    for name in ("one turn", "two turns", "four turns"):
        messages = as_read(marked, TALKS[name])
        options = {"return_assistant_tokens_mask": True, "return_dict": True}
        found = theirs.apply_chat_template(messages, **options)
        expected = runs(theirs, found["input_ids"], found["assistant_masks"])
        for ours, trl in zip(learned(tokenizer, encode_messages(tokenizer, TALKS[name])), expected, strict=True):
            # TRL counts headers and empty thoughts in that generation is prompted with, and may close a turn that is open
            ours, trl = (text.strip().removesuffix("</s>").removesuffix("<|user|>") for text in (ours, trl))
            assert trl.endswith(ours) or ours.endswith(trl)


def test_the_first_word_behind_a_prompt_that_ends_in_a_space_is_learned() -> None:
    tokenizer = train_bpe(["user: Five and three? assistant: Eight. and Nine."] * 20, 400)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    example = encode_messages(tokenizer, TALKS["two turns"])
    assert learned(tokenizer, example) == ["Eight.\n", "Nine.\n"]
    # before the answer alone the space is a token, with the answer's first word it is not: asked is the former
    prompt = transformers_ids(tokenizer, TALKS["one turn"][:1], add_generation_prompt=True)
    assert transformers_ids(tokenizer, TALKS["one turn"])[: len(prompt)] != prompt
    example = encode_messages(tokenizer, TALKS["one turn"])
    assert example.input_ids[: example.n_prompt].tolist() == prompt
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(TALKS["one turn"], tokenize=False)


def test_calls_and_turns_that_a_template_leaves_out_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'tool' %}{{ '[' + m['role'] + ']' + m['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"the chat template leaves out the call in turn 2"):
        encode_messages(tokenizer, [user("Weather?"), answer("I look.", tool_calls=[CALL])])
    tool = {"role": "tool", "content": "sunny"}
    with pytest.raises(DataError, match=r"leaves out turn 3 \(tool\)"):
        encode_messages(tokenizer, [user("Weather?"), answer("I look."), tool, answer("Sunny.")])
    with pytest.raises(DataError, match=r"leaves out turn 3 \(tool\)"):
        encode_prompt(tokenizer, [user("Weather?"), answer("I look."), tool])


def test_an_answer_that_the_template_does_not_close_is_learned_with_the_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    assert learned(tokenizer, encode_messages(tokenizer, TALKS["one turn"])) == ["Eight.<|endoftext|>"]


def test_tools_and_texts_that_a_template_has_no_place_for_are_refused() -> None:
    tokenizer = byte_tokenizer()
    ensure_template(tokenizer)
    for encode in (encode_messages, encode_prompt):
        with pytest.raises(DataError, match="tools: the chat template has no place for them"):
            encode(tokenizer, TALKS["one turn"], [TOOL])
    tokenizer.chat_template = (  # as Llama 3.1's: a call alone, whatever is said with it
        "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(DataError, match="leaves out the text of turn 2"):
        encode_messages(tokenizer, [user("Weather?"), answer("I look.", tool_calls=[CALL])])


@pytest.mark.skipif(not PATHS, reason="trl is not installed")
def test_the_answer_of_a_tool_is_never_learned() -> None:
    tool = {"role": "tool", "content": "31 degrees", "name": "look_up", "tool_call_id": "abcdefghi"}
    talk = [user("Weather?"), answer("I look.", tool_calls=[CALL]), tool, answer("It is 31.")]
    n_learned = 0
    for path in PATHS:
        tokenizer = tokenizer_of(path)
        try:
            texts = learned(tokenizer, encode_messages(tokenizer, talk, [TOOL]))
        except DataError:  # Gemma 4 writes it between a call and what is said with it
            continue
        n_learned += 1
        assert "31 degrees" not in "".join(texts), path.stem
    assert n_learned > 20
