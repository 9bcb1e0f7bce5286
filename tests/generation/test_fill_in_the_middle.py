"""Fill in the middle: the prompt that each family of models documents, and what ends an answer."""

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from genai_pl.generation import encode_gap, find_format
from genai_pl.generation.output_constraints import end_tokens
from tests.small_tokenizers import TOKENIZERS, byte_level_bpe, sentencepiece_bpe

BEFORE, AFTER = "def f(a):\n    return ", "\n\nprint(f(3))  # three"
# (special tokens, prompt) as the families' pages have them; transformers tokenizes the prompt with its special tokens
DOCUMENTED = {
    "qwen2.5-coder, codegemma": (
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        "<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>",
    ),
    "starcoder": (
        ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"],
        "<fim_prefix>{prefix}<fim_suffix>{suffix}<fim_middle>",
    ),
    "santacoder": (
        ["<fim-prefix>", "<fim-middle>", "<fim-suffix>"],
        "<fim-prefix>{prefix}<fim-suffix>{suffix}<fim-middle>",
    ),
    "deepseek-coder": (
        ["<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁end\uff5c>"],
        "<\uff5cfim▁begin\uff5c>{prefix}<\uff5cfim▁hole\uff5c>{suffix}<\uff5cfim▁end\uff5c>",
    ),
    "seed-coder": (
        ["<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"],
        "<[fim-suffix]>{suffix}<[fim-prefix]>{prefix}<[fim-middle]>",
    ),
}


def with_tokens(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer with more special tokens."""
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("family", DOCUMENTED)
def test_the_prompt_is_the_one_that_the_family_documents(family: str) -> None:
    names, prompt = DOCUMENTED[family]
    tokenizer = with_tokens(byte_level_bpe(), names)
    form = find_format(tokenizer)
    expected = tokenizer(prompt.format(prefix=BEFORE, suffix=AFTER))["input_ids"]
    assert encode_gap(tokenizer, form, BEFORE, AFTER) == expected
    before = tokenizer(BEFORE, add_special_tokens=False)["input_ids"]
    assert encode_gap(tokenizer, form, before, AFTER) == expected  # the same prefix as token ids
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names}
    assert ids < end_tokens(tokenizer, form.stops) | {-1}


@pytest.mark.parametrize("suffix", [AFTER, "more", " more", "\n"])
@pytest.mark.parametrize("prefix", [BEFORE, "", "Answer"])
def test_sentencepiece_puts_its_space_before_the_prefix_alone(prefix: str, suffix: str) -> None:
    """Meta's and Mistral's code: `encode(prefix)`, and of the suffix what follows a smiley in `encode(smiley + suffix)`."""
    llama = with_tokens(sentencepiece_bpe(), ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"])
    mistral = with_tokens(sentencepiece_bpe(), ["[PREFIX]", "[MIDDLE]", "[SUFFIX]"])
    plain = {"add_special_tokens": False}
    before = llama(prefix, **plain)["input_ids"]
    after = llama(f"☺{suffix}", **plain)["input_ids"][len(llama("☺", **plain)["input_ids"]) :]
    bos = llama.bos_token_id
    pre, mid, suf, eot = llama.convert_tokens_to_ids(["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"])
    form = find_format(llama)
    assert encode_gap(llama, form, prefix, suffix) == [bos, pre, *before, suf, *after, mid]
    assert encode_gap(llama, form, [bos, *before], suffix) == [bos, pre, *before, suf, *after, mid]
    assert eot in end_tokens(llama, form.stops)
    first, last = mistral.convert_tokens_to_ids(["[SUFFIX]", "[PREFIX]"])
    assert encode_gap(mistral, find_format(mistral), prefix, suffix) == [bos, first, *after, last, *before]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_without_such_tokens_has_no_format(kind: str) -> None:
    assert find_format(TOKENIZERS[kind]()) is None
