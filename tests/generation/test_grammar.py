import json
import re

import pytest
import torch

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import build_output_constraints, complete, generate_text
from genai_pl.generation.grammar import build_constraint

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Ann", "Bob"]},
        "old": {"type": "boolean"},
        "n": {"type": "integer", "maximum": 99},
    },
    "required": ["name", "old", "n"],
    "additionalProperties": False,
}
PATTERN = r"(a|bc)[0-9]{2}x?"


def brute_force(pattern: str, written: str, alphabet: str, longest: int) -> set[str]:
    """Characters that may follow so that some text of at most `longest` more characters matches; "" is the end."""
    texts = [""]
    results = {""} if re.fullmatch(pattern, written) else set()
    for _ in range(longest):
        texts = [text + c for text in texts for c in alphabet]
        results |= {text[0] for text in texts if re.fullmatch(pattern, written + text)}
    return results


@pytest.mark.parametrize("written", ["", "a", "b", "bc", "a1", "a12", "bc12x"])
def test_what_may_follow_is_what_python_would_match(byte_tokenizer, written):
    constraint = build_constraint(byte_tokenizer, json_schema=None, regex=PATTERN)
    constraint.begin(300)
    allowed = constraint.allowed(list(written.encode())).nonzero()[:, 0].tolist()
    expected = brute_force(PATTERN, written, "abcx12", 5)
    digits = {str(d) for d in range(10)} if {"1", "2"} <= expected else set()
    assert allowed == sorted(256 if c == "" else ord(c) for c in expected | digits)


def test_texts_that_part_are_told_apart(byte_tokenizer):
    constraint = build_constraint(byte_tokenizer, json_schema=None, regex=PATTERN)
    constraint.begin(257)
    texts = ["a12", "bc9", "a1", "", "bc99x", "bc9", "a"]
    before = [constraint.allowed(list(text.encode())) for text in texts]
    for text, mask in zip(texts, before, strict=True):
        fresh = build_constraint(byte_tokenizer, json_schema=None, regex=PATTERN)
        fresh.begin(257)
        assert torch.equal(mask, fresh.allowed(list(text.encode())))


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {}, {"temperature": 0, "num_beams": 3, "num_return": 3}, {"prompt_lookup": 2}]
)
def test_every_text_matches_the_expression(small_model, byte_tokenizer, options):
    config = GenerationConfig(max_new_tokens=20, regex=PATTERN, **options)
    generator = torch.Generator().manual_seed(0)
    n = 1 if config.num_beams > 1 else 4
    completions = complete(small_model(), byte_tokenizer, [[1, 2], [3]], config, num_samples=n, generator=generator)
    texts = [completion.text for of_prompt in completions for completion in of_prompt]
    assert len(texts) == 2 * max(n, config.num_return)
    assert all(re.fullmatch(PATTERN, text) for text in texts)


@pytest.mark.parametrize("form", ["text", "file"])
def test_json_is_what_the_schema_says(small_model, byte_tokenizer, form, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    schema = json.dumps(SCHEMA) if form == "text" else str(tmp_path / "schema.json")
    config = GenerationConfig(max_new_tokens=60, json_schema=schema, bad_words=[" ", "\n", "\t", "\r"])
    generator = torch.Generator().manual_seed(0)
    for [text] in generate_text(small_model(), byte_tokenizer, ["a", "bcd", "e"], config, generator=generator):
        value = json.loads(text)
        assert set(value) == {"name", "old", "n"}
        assert value["name"] in ("Ann", "Bob")
        assert isinstance(value["old"], bool)
        assert value["n"] <= 99


def test_the_constraint_begins_after_the_prefix(small_model, byte_tokenizer):
    config = GenerationConfig(max_new_tokens=20, regex=PATTERN, prefix="It is ", temperature=0)
    [[text]] = generate_text(small_model(), byte_tokenizer, ["x"], config)
    assert re.fullmatch("It is " + PATTERN, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "[0-"}, r"generation\.regex: "),
        ({"json_schema": "nowhere.json"}, r"generation\.json_schema=nowhere\.json: neither a file nor"),
        ({"json_schema": "{broken"}, "neither a file nor a JSON schema"),
        ({"json_schema": '{"type": "nothing"}'}, r"generation\.json_schema: "),
        ({"json_schema": "{}", "regex": "a"}, "give one of them"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(small_model, byte_tokenizer, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        generate_text(small_model(), byte_tokenizer, ["x"], GenerationConfig(**options))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_is_an_error(byte_level_tokenizer, small_model):
    with pytest.raises(ConfigError, match="no eos token"):
        generate_text(small_model(), byte_level_tokenizer(), ["x"], GenerationConfig(regex="a"))


def test_no_library_is_one_line_that_names_the_extra(byte_tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'genai_pl\[constrain\]'"):
        build_output_constraints(byte_tokenizer, GenerationConfig(regex="a"))
