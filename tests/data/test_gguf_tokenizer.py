"""Tokenizers in GGUF: read back by us and by transformers, they make the same tokens; others are refused."""

import json
from pathlib import Path

import pytest
from small_tokenizers import (
    LINES,
    byte_level_bpe,
    scored_sentencepiece_bpe,
    sentencepiece_bpe,
    unigram,
    wordpiece,
    wrapped,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from genai_pl.data import byte_tokenizer
from genai_pl.data.gguf_pre_tokenizers import ALIASES, KNOWN, known_pre_tokenizer, pre_tokenizer_json, steps_of
from genai_pl.data.gguf_read import end_ids, tokenizer_from_metadata
from genai_pl.data.gguf_tokenizer import tokenizer_metadata
from genai_pl.errors import CheckpointError, ConfigError

TEXTS = [*LINES[:3], "a1b22 c333 DÉJÀ  vu\r\n\n\tI'LL don't 日本 🤗 x=3.14;\u00a0<s>b</s> <|endoftext|>c", "", " "]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def metadata(tokenizer: PreTrainedTokenizerBase, **options: object) -> dict[str, object]:
    return tokenizer_metadata(tokenizer, **{"vocab_size": len(tokenizer) + 3, "end_ids": (1, 2), **options}).keys


def byte_level(
    pre_tokenizer: object, normalizer: object = None, *, ignore_merges: bool = False
) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer behind a pre-tokenizer, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return wrapped(tokenizer)


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    splitting = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([splitting, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    "make", [byte_tokenizer, byte_level_bpe, scored_sentencepiece_bpe], ids=lambda make: make.__name__
)
def test_a_tokenizer_reads_back_with_its_tokens_special_tokens_and_texts(make):
    tokenizer = make()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    keys = metadata(tokenizer)
    back = tokenizer_from_metadata(keys)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert back(text)["input_ids"] == ids
        assert back.decode(ids) == tokenizer.decode(ids)
    assert back.special_tokens_map == tokenizer.special_tokens_map
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.chat_template == tokenizer.chat_template
    assert len(keys["tokenizer.ggml.tokens"]) == len(tokenizer) + 3
    assert keys["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]


def test_transformers_reads_the_scores_as_the_same_tokenizer(tmp_path: Path):
    gguf = pytest.importorskip("gguf", reason="GGUF files are written by the package gguf")
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    from genai_pl.models.gguf.writer import _add_keys

    tokenizer = scored_sentencepiece_bpe()
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    _add_keys(writer, metadata(tokenizer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    values = load_gguf_checkpoint(str(tmp_path / "t.gguf"))["tokenizer"]
    theirs, _ = convert_gguf_tokenizer("llama", values)
    for text in TEXTS[:3]:
        assert (
            theirs.encode(text, add_special_tokens=False).ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (split_by(QWEN2), "qwen2"),
        (split_by(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "llama-bpe"),
    ],
)
def test_the_name_follows_from_the_patterns(pre_tokenizer: pre_tokenizers.PreTokenizer, name: str):
    tokenizer = byte_level(pre_tokenizer)
    keys = metadata(tokenizer)
    assert keys["tokenizer.ggml.pre"] == name
    back = tokenizer_from_metadata(keys)
    assert [back(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_words_outside_of_merges_decide_between_two_names():
    tokenizer = byte_level(split_by(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), ignore_merges=True)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["zzz"] = len(state["model"]["vocab"])  # no merge makes it
    names = {}
    for ignored in (True, False):
        state["model"]["ignore_merges"] = ignored
        names[ignored] = metadata(wrapped(Tokenizer.from_str(json.dumps(state))))["tokenizer.ggml.pre"]
    assert names == {True: "llama-bpe", False: "dbrx"}


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_pre_tokenizer_is_read_as_it_is_written(name: str):
    state = pre_tokenizer_json(KNOWN[name])
    loaded = json.loads(Tokenizer.from_str(json.dumps({**EMPTY, "pre_tokenizer": state})).to_str())["pre_tokenizer"]
    assert steps_of(loaded) == KNOWN[name].steps


EMPTY = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


def test_aliases_lead_to_known_names():
    assert {*ALIASES.values()} <= {*KNOWN}
    assert known_pre_tokenizer("smaug-bpe") == KNOWN["dbrx"]
    assert known_pre_tokenizer("no-such") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unigram, "llama.cpp's decoders have byte-level BPE or SentencePiece's, not Unigram"),
        (wordpiece, "not WordPiece"),
        (sentencepiece_bpe, "llama.cpp would merge"),
        (lambda: byte_level(split_by(r"\w+|\W+")), r"no pre-tokenizer with the patterns ['\\w+|\\W+']"),
        (
            lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "no pre-tokenizer ByteLevel {'add_prefix",
        ),
        (
            lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Lowercase()),
            "no normalizer Lowercase before byte-level BPE",
        ),
    ],
    ids=range(6),
)
def test_what_llama_cpp_tokenizes_otherwise_is_refused(make, message: str):
    with pytest.raises(ConfigError) as error:
        metadata(make())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_end_tokens_and_tokens_around_a_text_are_stated():
    keys = metadata(scored_sentencepiece_bpe(), end_ids=(5, 2, 7, 9))
    assert end_ids(keys) == [2, 5, 7]  # the tokenizer's own first; there is room for three
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert [types[token] for token in ("<unk>", "<s>", "<0x0A>", "th")] == [2, 3, 6, 1]


def test_a_normalizer_for_composed_characters_is_noted():
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    notes = tokenizer_metadata(tokenizer, vocab_size=len(tokenizer), end_ids=()).notes
    assert notes == [
        "llama.cpp does not normalize texts (NFC): composed characters, as keyboards type them, are the same"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer 'rwkv' is not read; supported: gpt2 and llama"),
        ({"tokenizer.ggml.pre": "viking"}, "pre-tokenizer 'viking' is not read; supported: gpt-2, smollm"),
        ({"tokenizer.ggml.merges": ["a zz"], "tokenizer.ggml.token_type": [1]}, "its tokenizer is not readable"),
        ({"tokenizer.ggml.tokens": None}, "its tokenizer is not readable"),
    ],
)
def test_tokenizers_of_others_are_read_or_refused_in_one_line(changes: dict, message: str):
    with pytest.raises(CheckpointError) as error:
        tokenizer_from_metadata({**metadata(byte_level_bpe()), **changes})
    assert message in str(error.value)
