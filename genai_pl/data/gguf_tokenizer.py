"""Tokenizers as metadata of GGUF: vocabulary, merges or scores, special tokens and chat template.

Two of llama.cpp's models of tokenizers are written: `gpt2`, byte-level BPE with a pre-tokenizer that has a name, and
`llama`, SentencePiece's BPE with scores in the place of merges. What would be tokenized otherwise there is refused.
"""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.gguf_pre_tokenizers import KNOWN, name_of, steps_of
from genai_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = Mapping[str, object]
KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's types of tokens
SPACE = "▁"  # in SentencePiece's vocabularies
ENDS = ("eos", "eot", "eom")  # llama.cpp's kinds of tokens that end a text
NO_MERGE = ("[PAD]", "[PAD]")  # the format has no empty list: a merge of what is no single character
ADVICE = "format=hf writes this tokenizer"


class TokenizerMetadata(NamedTuple):
    """keys: metadata. notes: where llama.cpp differs from the tokenizer, one line each."""

    keys: dict[str, object]
    notes: list[str]


def tokenizer_metadata(
    tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int, end_ids: Iterable[int]
) -> TokenizerMetadata:
    """The metadata of a tokenizer; ConfigError for one that llama.cpp does not have.

    vocab_size: rows of the model's embedding. end_ids: tokens that end a text, the first three of which are stated.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"format=gguf: llama.cpp's decoders have byte-level BPE or SentencePiece's, not {model['type']}"
        )
    if max(tokenizer.get_vocab().values()) >= vocab_size:
        raise ConfigError(f"format=gguf: the tokenizer has tokens beyond the model's {vocab_size}; resize the model")
    added = {token["id"]: token for token in state["added_tokens"] or ()}
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    if len({*tokens}) < vocab_size:
        raise ConfigError(
            "format=gguf: the tokenizer has a token called like those that fill up the vocabulary: [PADn]"
        )
    # the two models of tokenizers
    own, notes = _sentencepiece(state, tokens, added) if model.get("byte_fallback") else _byte_level(state)
    types = [_type_of(i, token, by_id, added, model) for i, token in enumerate(tokens)]
    keys = {f"{KEY}{name}": value for name, value in own.items()}
    keys |= {f"{KEY}tokens": tokens, f"{KEY}token_type": types, **_special_tokens(tokenizer, end_ids)}
    if any(token[side] for token in added.values() for side in ("lstrip", "rstrip")):
        notes.append("llama.cpp keeps spaces beside special tokens, which this tokenizer strips")
    return TokenizerMetadata({**keys, **_templates(tokenizer)}, notes)


def _byte_level(state: Json) -> tuple[dict[str, object], list[str]]:
    """Byte-level BPE: merges, and the name of the pre-tokenizer."""
    model = state["model"]
    notes = _check_normalizer(state)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    # without merges every byte is a token, whatever splits the text
    steps = steps_of(state["pre_tokenizer"]) if merges else KNOWN["gpt-2"].steps
    indifferent = not merges or _reached_by_merges(state)
    name = name_of(steps, ignore_merges=None if indifferent else bool(model.get("ignore_merges")))
    merges = merges or [NO_MERGE]
    return {"model": "gpt2", "pre": name, "merges": [" ".join(merge) for merge in merges]}, notes


def _check_normalizer(state: Json) -> list[str]:
    """Notes about a normalizer that llama.cpp leaves out; ConfigError for one that changes usual texts."""
    normalizer = state["normalizer"]
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if not parts:
        return []
    kinds = [part["type"] for part in parts]
    if {*kinds} == {"NFC"}:
        return ["llama.cpp does not normalize texts (NFC): composed characters, as keyboards type them, are the same"]
    raise ConfigError(f"format=gguf: llama.cpp has no normalizer {', '.join(kinds)} before byte-level BPE; {ADVICE}")


def _reached_by_merges(state: Json) -> bool:
    """True if merges alone make every token of the vocabulary from its characters: ignore_merges changes nothing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps({**EMPTY, "model": {**state["model"], "ignore_merges": False}}))
    apart = {token["content"] for token in state["added_tokens"] or ()}  # found before words are
    words = [token for token in state["model"]["vocab"] if token not in apart]
    return all(len(encoding.ids) == 1 for encoding in tokenizer.encode_batch(words))


EMPTY = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
}


def _sentencepiece(state: Json, tokens: list[str], added: Mapping[int, Json]) -> tuple[dict[str, object], list[str]]:
    """SentencePiece's BPE: scores from the order of merges, and whether a space stands before a text."""
    prefix, splits, notes = _spaces(state)
    model = state["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    plain = {token for i, token in enumerate(tokens) if i not in added and token in model["vocab"]}
    ranks = _ranks(merges, plain)
    if splits and any(SPACE in token[1:] for token in ranks):
        raise ConfigError(f"format=gguf: llama.cpp merges across spaces, at which this tokenizer splits; {ADVICE}")
    # a token that no merge makes is found as a character, whatever its score
    scores = [-float(ranks.get(token, 0)) for token in tokens]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}, notes


def _ranks(merges: list[list[str]], vocab: set[str]) -> dict[str, int]:
    """The order in which tokens are made; ConfigError where llama.cpp, which knows tokens and no pairs, would differ."""
    ranks: dict[str, int] = {}
    pairs = set()
    for left, right in merges:
        token = left + right
        if token in ranks and ranks[token] != len(ranks) - 1:
            raise ConfigError(
                f"format=gguf: merges of {token!r} stand apart, llama.cpp has one score a token; {ADVICE}"
            )
        ranks.setdefault(token, len(ranks))
        pairs.add((left, right))
    for token in vocab & ranks.keys() | {token for token in vocab if len(token) > 1 and not _is_byte(token)}:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab and (left, right) not in pairs:
                raise ConfigError(
                    f"format=gguf: llama.cpp would merge {left!r} and {right!r}, which this tokenizer does not; {ADVICE}"
                )
    return ranks


def _spaces(state: Json) -> tuple[bool, bool, list[str]]:
    """Whether a space is put before texts, whether texts are split at spaces, and notes; ConfigError for other steps."""
    normalizer, pre = state["normalizer"], state["pre_tokenizer"]
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    rest = [part for part in parts if part != replaces]
    prefix = rest == [{"type": "Prepend", "prepend": SPACE}]
    if rest and not prefix:
        kinds = ", ".join(part["type"] for part in rest)
        raise ConfigError(f"format=gguf: llama.cpp has no normalizer {kinds} before SentencePiece's BPE; {ADVICE}")
    if pre is None and replaces in parts:
        return prefix, False, []
    # Gemma splits at spaces after they are replaced, which splits nothing
    if pre and pre["type"] == "Split" and pre["pattern"] == {"String": " "} and replaces in parts:
        return prefix, False, []
    if pre and pre["type"] == "Metaspace" and pre["replacement"] == SPACE and not parts:
        scheme = pre.get("prepend_scheme", "always")
        note = ["llama.cpp puts a space after special tokens too, this tokenizer at the start of a text only"]
        return scheme != "never", bool(pre.get("split", True)), note if scheme == "first" else []
    kind = pre["type"] if pre else "without spaces replaced"
    raise ConfigError(f"format=gguf: llama.cpp has no pre-tokenizer {kind} before SentencePiece's BPE; {ADVICE}")


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _type_of(i: int, token: str, by_id: Mapping[int, str], added: Mapping[int, Json], model: Json) -> int:
    """llama.cpp's type of a token."""
    if i not in by_id:
        return UNUSED
    if model.get("byte_fallback") and _is_byte(token):
        return BYTE
    if token == model.get("unk_token"):
        return UNKNOWN
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    return NORMAL


def _special_tokens(tokenizer: "PreTrainedTokenizerBase", end_ids: Iterable[int]) -> dict[str, object]:
    """Ids of special tokens, and whether texts begin and end with one; ConfigError for a text that begins otherwise."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = {"bos": bos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    ids |= dict(zip(ENDS, dict.fromkeys([i for i in (eos,) if i is not None] + [*end_ids]), strict=False))
    keys = {f"{KEY}{name}_token_id": int(i) for name, i in ids.items() if i is not None}
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    forms = {(begins, ends): [bos] * begins + bare + [eos] * ends for begins in (False, True) for ends in (False, True)}
    found = next((form for form, tokens in forms.items() if tokens == whole), None)
    if found is None:
        raise ConfigError(
            f"format=gguf: llama.cpp cannot put the tokens around a text that this tokenizer does; {ADVICE}"
        )
    return keys | {f"{KEY}add_bos_token": found[0], f"{KEY}add_eos_token": found[1]}


def _templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, object]:
    """The chat template, and others by their names."""
    template = tokenizer.chat_template
    if not isinstance(template, dict):
        return {"tokenizer.chat_template": template} if template else {}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    keys = {"tokenizer.chat_templates": [name for name in template if name != "default"], **named}
    return keys | ({"tokenizer.chat_template": template["default"]} if "default" in template else {})
