import json
import re
from dataclasses import replace

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
LISTS = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a"],
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
    config = GenerationConfig(max_new_tokens=150, json_schema=schema)
    generator = torch.Generator().manual_seed(0)
    for [text] in generate_text(small_model(), byte_tokenizer, ["a", "bcd", "e"], config, generator=generator):
        value = json.loads(text)
        assert set(value) == {"name", "old", "n"}
        assert value["name"] in ("Ann", "Bob")
        assert isinstance(value["old"], bool)
        assert value["n"] <= 99


def test_a_text_that_turns_back_is_read_as_a_new_one(byte_tokenizer):
    """Masks are those of a constraint that has read nothing else: llguidance's own rollback gives others here."""
    n, t = {"type": "integer"}, {"type": "array", "items": {"enum": ["ab", "c"]}}
    schema = {"type": "object", "properties": {"n": n, "t": t}, "required": ["n", "t"], "additionalProperties": False}
    schema["x-guidance"] = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]+"}
    texts = [b'{\t\t\t\n  "n"\n:9\n', b'{"n":13\n\n\r, ', b'{"n":13\n\n\r, "t"', b'{"n":13\n']
    shared, *fresh = (
        build_constraint(byte_tokenizer, json_schema=json.dumps(schema), regex=None) for _ in range(len(texts) + 1)
    )
    shared.begin(300)
    for text, alone in zip(texts, fresh, strict=True):
        alone.begin(300)
        assert torch.equal(shared.allowed(list(text)), alone.allowed(list(text)))
    assert shared.allowed(list(texts[1])).nonzero()[:, 0].tolist() == sorted(b' \t\n\r"')


def test_what_json_dumps_writes_is_allowed(byte_tokenizer):
    constraint = build_constraint(byte_tokenizer, json_schema=json.dumps(LISTS), regex=None)
    constraint.begin(300)
    for indent in (None, 1, 2, 4):
        text = json.dumps({"a": [1, 23]}, indent=indent).encode()
        assert all(constraint.allowed(list(text[:n]))[text[n]] for n in range(len(text)))
        assert constraint.allowed(list(text))[byte_tokenizer.eos_token_id]


@pytest.mark.parametrize("liked", [" ", "\n", " \n\t\r"])
def test_json_ends_although_blanks_are_the_likeliest(small_model, byte_tokenizer, liked):
    """Whatever blanks a model prefers, each place between two parts has few of them."""
    config = GenerationConfig(max_new_tokens=220, temperature=0, json_schema=json.dumps(SCHEMA))
    bias = dict.fromkeys(liked.encode(), 100.0) | dict.fromkeys(b"0123456789", -50.0)
    [[text]] = generate_text(small_model(), byte_tokenizer, ["x"], replace(config, logit_bias=bias))
    assert set(json.loads(text)) == {"name", "old", "n"}
    assert any(blank in text for blank in liked)


def test_a_schema_may_set_its_own_blanks(byte_tokenizer):
    for options, blanks in [({"whitespace_flexible": False}, b""), ({"whitespace_pattern": "\t+"}, b"\t")]:
        constraint = build_constraint(
            byte_tokenizer, json_schema=json.dumps({**LISTS, "x-guidance": options}), regex=None
        )
        constraint.begin(300)
        assert constraint.allowed(list(b"{")).nonzero()[:, 0].tolist() == sorted(b'"' + blanks)


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
        ({"json_schema": '{"const": "\\ud800"}'}, r"generation\.json_schema: unexpected end of hex escape"),
        ({"json_schema": '{"const": NaN}'}, r"generation\.json_schema: expected value"),
        ({"json_schema": '{"x-guidance": 3}'}, r"generation\.json_schema: invalid type: integer"),
        ({"json_schema": '{"x-guidance": {"whitespace": " "}}'}, r"generation\.json_schema: unknown field"),
        ({"json_schema": '{"not":' * 100_000}, "nested too deeply|neither a file nor"),
        ({"json_schema": '{"not":' * 150 + "{}" + "}" * 150}, "recursion limit"),
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
