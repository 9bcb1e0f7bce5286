"""Tokens of prompts and answers are the same wherever they are asked for, with tokenizers of every kind."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from genai_pl.data.preference import tokenize_preference
from genai_pl.data.prompt_tokens import (
    encode_answers,
    encode_completion,
    encode_messages,
    encode_prompts,
    ensure_template,
    turn_end_token,
)
from genai_pl.data.tokenizer import end_token
from genai_pl.data.unpaired import tokenize_completions
from genai_pl.errors import DataError
from genai_pl.evaluation.preferences import pair_windows, reward_tokens
from genai_pl.generation import encode_prompt
from tests.small_tokenizers import TOKENIZERS

HEADERS = (  # a header of three tokens and a token that ends the turn, as Llama 3 has them
    "{% for m in messages %}{{ '<|h|>' + m['role'] + '<|e|>\\n' + m['content'] | trim + '<|t|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|e|>\\n' }}{% endif %}"
)
LINES = HEADERS.replace(
    "<|e|>\\n", "<|e|>\\n\\n"
)  # two line breaks, which some tokenizers join at the end of a text only
SPACES = HEADERS.replace("<|e|>\\n", ": ")  # a space, which many join with the first word
TALK = [
    {"role": "user", "content": "Five and three?"},
    {"role": "assistant", "content": "Eight."},
    {"role": "user", "content": "And one?"},
]
PROMPTS = {"text": "Five and three? ", "no space": "Answer:", "empty": "", "messages": TALK[:1], "three turns": TALK}
ANSWERS = ["Nine.", " Eight, or three", "two\n\nthree"]


def tokenizer_of(kind: str, template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = TOKENIZERS[kind]()
    if template is not None:
        tokenizer.add_tokens(["<|h|>", "<|e|>", "<|t|>"], special_tokens=True)
        tokenizer.chat_template = template
    ensure_template(tokenizer)
    return tokenizer


@pytest.mark.parametrize("template", [None, HEADERS, LINES, SPACES], ids=["chatml", "headers", "lines", "spaces"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_generation_evaluation_and_judges_agree_on_the_tokens(
    kind: str, prompt: str | list, template: str | None
) -> None:
    tokenizer = tokenizer_of(kind, template)
    asked = encode_prompt(tokenizer, prompt) if prompt else []
    for answer in ANSWERS:
        example = encode_completion(tokenizer, prompt, answer)  # SFT
        n_prompt = example.n_prompt
        assert example.input_ids[:n_prompt].tolist() == asked or not prompt
        end = {turn_end_token(tokenizer), end_token(tokenizer)} & set(example.input_ids[n_prompt:].tolist())
        assert end
        assert example.loss_mask[n_prompt:].all()
        # DPO and KTO, rewards in training, evaluate.py on pairs
        (given, (said,)) = encode_answers(tokenizer, [prompt], [[answer]])[0]
        kto = tokenize_completions({"prompt": [prompt], "completion": [answer]}, tokenizer)
        dpo = tokenize_preference({"prompt": [prompt], "answers": [[answer, "No."]]}, tokenizer)
        for row in (
            np.concatenate([given, said]),
            np.concatenate([kto["prompt"][0], kto["completion"][0]]),
            np.concatenate([dpo["prompt"][0], dpo["completions"][0][: dpo["lengths"][0][0]]]),
            reward_tokens(tokenizer, [prompt], [answer])[0],
        ):
            assert row.tolist() == example.input_ids.tolist()
        if n_prompt:
            (scored,) = pair_windows([prompt], [answer], tokenizer, seq_len=500)
            assert scored.tokens.tolist() == example.input_ids.tolist()
            assert scored.n_context == n_prompt


@pytest.mark.parametrize("template", [None, HEADERS], ids=["chatml", "headers"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_conversations_have_the_tokens_that_transformers_makes_of_the_saved_tokenizer(
    kind: str, template: str | None, tmp_path: Path
) -> None:
    tokenizer = tokenizer_of(kind, template)
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    whole = [*TALK, {"role": "assistant", "content": "Nine."}]
    ids = theirs.apply_chat_template(whole, return_dict=True)["input_ids"]
    assert encode_messages(tokenizer, whole).input_ids.tolist() == ids
    ids = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(tokenizer, TALK) == ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_keeps_the_token_before_it_and_drops_the_one_that_closes_it(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer("Five and three?")["input_ids"]
    closed = kind in ("unigram", "wordpiece")
    assert encode_prompts(tokenizer, ["Five and three?"])[0].tolist() == (ids[:-1] if closed else ids)


def test_a_rendered_conversation_has_one_token_before_it() -> None:
    tokenizer = TOKENIZERS["sentencepiece_bpe"]()
    tokenizer.chat_template = "{{ bos_token }}" + HEADERS
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    ids = encode_prompt(tokenizer, text)
    assert ids == encode_prompt(tokenizer, TALK)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_an_end_token_that_is_typed_stays_where_the_tokenizer_adds_none() -> None:
    tokenizer = TOKENIZERS["byte"]()
    typed = "Five" + tokenizer.eos_token
    assert encode_prompt(tokenizer, typed) == tokenizer(typed)["input_ids"]


def test_a_tokenizer_without_a_template_refuses_conversations() -> None:
    with pytest.raises(DataError, match="has no chat template"):
        encode_messages(TOKENIZERS["byte"](), TALK[:2])
