"""Tokenizers from metadata of GGUF, as transformers' fast ones."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from genai_pl.data.gguf_pre_tokenizers import KNOWN, known_pre_tokenizer, pre_tokenizer_json
from genai_pl.data.gguf_tokenizer import BYTE, CONTROL, EMPTY, ENDS, KEY, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from genai_pl.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Keys = Mapping[str, object]
TEMPLATE = "tokenizer.chat_template"


def tokenizer_from_metadata(keys: Keys) -> "PreTrainedTokenizerBase":
    """The tokenizer of a file; CheckpointError for a kind that is not read."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        kind, tokens = keys[f"{KEY}model"], keys[f"{KEY}tokens"]
        if kind not in ("gpt2", "llama"):
            raise CheckpointError(f"tokenizer {kind!r} is not read; supported: gpt2 and llama (BPE)")
        types = keys.get(f"{KEY}token_type") or [1] * len(tokens)
        state = _byte_level(keys, tokens, types) if kind == "gpt2" else _sentencepiece(keys, tokens, types)
        state["added_tokens"] = _added_tokens(tokens, types)
        state["post_processor"] = _post_processor(keys, tokens, add_bos=kind == "llama")
        backend = Tokenizer.from_str(json.dumps(state))
    except KeyError as error:
        raise CheckpointError(f"{error.args[0]} is missing: a file without a tokenizer") from None
    except CheckpointError:
        raise
    except Exception as error:  # those of tokenizers have no class of their own
        raise CheckpointError(f"its tokenizer is not readable ({str(error).splitlines()[0]})") from None
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: keys.get(f"{KEY}{key}_token_id") for name, key in names.items()}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}
    inputs = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_input_names=inputs, **special
    )
    if isinstance(keys.get(TEMPLATE), str):
        tokenizer.chat_template = keys[TEMPLATE]
    return tokenizer


def end_ids(keys: Keys) -> list[int]:
    """The tokens that end a text, in the order of the file."""
    return [keys[f"{KEY}{kind}_token_id"] for kind in ENDS if f"{KEY}{kind}_token_id" in keys]


def _vocab(tokens: list[str], types: list[int]) -> dict[str, int]:
    """The vocabulary without those that fill it up."""
    return {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}


def _byte_level(keys: Keys, tokens: list[str], types: list[int]) -> dict[str, object]:
    """tokenizer.json of byte-level BPE."""
    name = keys.get(f"{KEY}pre", "default")
    known = known_pre_tokenizer(name)
    if known is None:
        supported = ", ".join(KNOWN)
        raise CheckpointError(
            f"pre-tokenizer {name!r} is not read; supported: {supported}; put tokenizer.json beside it"
        )
    vocab = _vocab(tokens, types)
    merges = [merge.split(" ", 1) for merge in keys[f"{KEY}merges"]]
    merges = [merge for merge in merges if "".join(merge) in vocab]  # a list without merges has one that makes nothing
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": known.ignore_merges}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return {**EMPTY, "model": model, "pre_tokenizer": pre_tokenizer_json(known), "decoder": decoder}


def _sentencepiece(keys: Keys, tokens: list[str], types: list[int]) -> dict[str, object]:
    """tokenizer.json of SentencePiece's BPE: a merge for each pair that makes a token, in the order of scores."""
    vocab, scores = _vocab(tokens, types), keys[f"{KEY}scores"]
    special = {i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)}
    pairs = []
    for token, i in vocab.items():
        if i not in special:
            cuts = [(token[:n], token[n:]) for n in range(1, len(token))]
            pairs += [(-scores[i], i, [a, b]) for a, b in cuts if vocab.get(a, -1) >= 0 and b in vocab]
    merges = [pair for *_, pair in sorted(pairs, key=lambda found: found[:2])]
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": merges,
        "unk_token": unknown,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    restored = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    prefix = keys.get(f"{KEY}add_space_prefix", True)
    normalizers = [{"type": "Prepend", "prepend": SPACE}] * prefix + [replaced]
    decoders = [restored, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return {
        **EMPTY,
        "model": model,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _added_tokens(tokens: list[str], types: list[int]) -> list[dict[str, object]]:
    """The tokens that are found in a text before it is split."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": token, **flags, "special": kind != USER_DEFINED}
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _post_processor(keys: Keys, tokens: list[str], *, add_bos: bool) -> dict[str, object] | None:
    """The tokens around a text; None for none. add_bos: whether it begins with one where the file does not say."""
    around = {}
    for name, default in (("bos", add_bos), ("eos", False)):
        i = keys.get(f"{KEY}{name}_token_id")
        if keys.get(f"{KEY}add_{name}_token", default) and i is not None:
            around[name] = i
    if not around:
        return None
    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in around.values()}

    def token(end: str, kind: int) -> list[dict[str, object]]:
        return [{"SpecialToken": {"id": tokens[around[end]], "type_id": kind}}] if end in around else []

    def sequence(name: str, kind: int) -> list[dict[str, object]]:
        return [*token("bos", kind), {"Sequence": {"id": name, "type_id": kind}}, *token("eos", kind)]

    first, second = sequence("A", 0), sequence("B", 1)
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": special}
