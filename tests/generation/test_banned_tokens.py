import random

import pytest
import torch
import transformers

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import OutputConstraints, build_output_constraints, complete, generate, generate_text, left_pad
from genai_pl.generation.banned_tokens import BannedTokens, build_banned_tokens

CPU = torch.device("cpu")


def greedy(n: int, **options: object) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=n, temperature=0, **options)


def masked(processor: transformers.LogitsProcessor, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    return processor(ids, torch.zeros(len(ids), vocab_size)).isinf()


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ngrams_are_excluded_as_transformers_excludes_them(n):
    ids = torch.randint(0, 4, (20, 15), generator=torch.Generator().manual_seed(n))
    banned_tokens = BannedTokens(GenerationConfig(no_repeat_ngram_size=n), OutputConstraints(), ids[:, :6].tolist(), 4)
    expected = masked(transformers.NoRepeatNGramLogitsProcessor(n), ids, 4)
    assert torch.equal(banned_tokens.mask(ids[:, 6:].tolist(), CPU, strict=False), expected)
    assert expected.any()


def test_bad_words_are_excluded_as_transformers_excludes_them():
    ids = torch.randint(0, 5, (30, 8), generator=torch.Generator().manual_seed(0))
    words = [[4], [1, 2], [3, 3, 0], [0] * 12]
    banned_tokens = BannedTokens(
        GenerationConfig(), OutputConstraints(bad_words=tuple(map(tuple, words))), ids[:, :2].tolist(), 5
    )
    expected = masked(transformers.NoBadWordsLogitsProcessor(words), ids, 5)
    assert torch.equal(banned_tokens.mask(ids[:, 2:].tolist(), CPU), expected)


def test_greedy_tokens_under_all_rules_equal_transformers(pair):
    theirs, ours = pair
    input_ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    words, prefix, eos = [[28], [9, 10], [50, 3]], (17, 4), 50
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 12}

    def allowed(_: int, row: torch.Tensor) -> list[int]:
        n = len(row) - 4
        return [prefix[n]] if n < len(prefix) else list(range(100))

    expected = theirs.generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=30, do_sample=False, pad_token_id=0,
        eos_token_id=eos, bad_words_ids=words, prefix_allowed_tokens_fn=allowed, **options,
    )  # fmt: skip
    constraints = OutputConstraints(ends=frozenset({eos}), bad_words=tuple(map(tuple, words)), prefix=prefix)
    tokens = generate(ours, input_ids, greedy(30, **options), eos_token_id=eos, constraints=constraints)
    assert torch.equal(tokens, expected)
    assert tokens[0, 4:6].tolist() == list(prefix)


def test_padding_is_in_no_ngram():
    input_ids, segment_ids = left_pad([[1, 2, 3, 1], [0, 0]], 0)
    banned_tokens = build_banned_tokens(
        GenerationConfig(no_repeat_ngram_size=1), OutputConstraints(), input_ids, segment_ids, 5
    )
    assert banned_tokens.mask([[], []], CPU).tolist() == [[False, True, True, True, False], [True] + [False] * 4]


def test_no_rule_costs_nothing():
    assert build_banned_tokens(GenerationConfig(), OutputConstraints(), torch.ones(1, 2), None, 5) is None


def test_the_prefix_comes_first_whatever_else_is_asked(small_model, byte_tokenizer):
    config = greedy(12, prefix="Yes, yes", no_repeat_ngram_size=1, bad_words=["Y"], min_new_tokens=3)
    for text in generate_text(small_model(), byte_tokenizer, ["Is it?", "y"], config, num_samples=1):
        assert text[0].startswith("Yes, yes")


def test_a_prefix_has_the_tokens_that_it_has_inside_a_text(word_tokenizer):
    constraints = build_output_constraints(word_tokenizer, GenerationConfig(prefix="world how"))
    assert word_tokenizer.decode([*word_tokenizer.encode("Hello"), *constraints.prefix]) == "Helloworld how"


def test_bad_words_never_appear(small_model, byte_tokenizer):
    model, words = small_model(vocab_size=128), []
    text = generate_text(model, byte_tokenizer, ["x"], greedy(30))[0][0]
    for _ in range(5):
        words.append(text[random.Random(len(words)).randrange(28) :][:2])
        text = generate_text(model, byte_tokenizer, ["x"], greedy(30, bad_words=words))[0][0]
        assert not any(word in text for word in words)


def test_no_end_before_min_new_tokens(scripted, byte_tokenizer):
    model = scripted([*b"a", 256, *b"bc", 256, *b"d"])
    [[completion]] = complete(model, byte_tokenizer, [[5]], greedy(9, min_new_tokens=3))
    assert len(completion.tokens) == 5
    assert completion.tokens[-1] == 256


def test_rules_that_leave_no_token_are_a_mistake_of_the_user(small_model):
    with pytest.raises(ConfigError, match="no token may come next"):
        generate(small_model(vocab_size=3), torch.tensor([[0, 1, 2]]), greedy(4, no_repeat_ngram_size=1))
