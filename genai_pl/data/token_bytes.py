"""Bytes of tokens: how much text each token stands for, whether a word begins with it, whether it is text at all.

Bits per byte compare models with different tokenizers, so bytes are counted exactly: decoding token by token would not
do, as one token may be half of a character.
"""

import json
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.data.tokenizer import FIM, SENTINELS, end_token
from genai_pl.objectives.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def special_tokens(tokenizer: "PreTrainedTokenizerBase", size: int) -> SpecialTokens:
    """What objectives need to know of a tokenizer (`SpecialTokens`), for a model with `size` ids."""
    vocab = tokenizer.get_vocab()
    wordpiece = type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"
    special = np.ones(size, bool)  # ids beyond the tokenizer's are no text either
    starts_word = np.zeros(size, bool)
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    # properties of every id
    for token, i in vocab.items():
        special[i] = i in added
        starts_word[i] = _starts_word(token, wordpiece=wordpiece)
    # ids by name
    return SpecialTokens(
        size=size,
        pad=tokenizer.pad_token_id or 0,
        end=end_token(tokenizer),
        mask=tokenizer.mask_token_id,
        sentinels=tuple(vocab[name] for name in SENTINELS if name in vocab),
        fim=tuple(vocab[name] for name in FIM) if all(name in vocab for name in FIM) else None,
        special=special,
        starts_word=starts_word,
        n_bytes=np.asarray(token_bytes(tokenizer, size)),
    )


def _starts_word(token: str, *, wordpiece: bool) -> bool:
    """Whether a word begins with the token: WordPiece marks the others (##), the rest mark a space (Ġ, ▁) or line break (Ċ)."""
    if wordpiece:
        return not token.startswith("##")
    return token[:1] in ("Ġ", "▁", "Ċ") or not token[:1].isalnum()


def token_bytes(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[int]:
    """UTF-8 bytes of text that each token stands for, (V,); 0 for special and unused tokens."""
    spelling = _Spelling(tokenizer)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    counts = [0] * max(vocab_size, len(tokenizer))
    for token, i in tokenizer.get_vocab().items():
        if i not in special:  # an added token is spelled literally, whatever the vocabulary's spelling
            counts[i] = len(token.encode()) if i in added else spelling.n_bytes(token)
    return counts[:vocab_size]


class _Spelling:
    """The spelling of a vocabulary: a character per byte, bytes by number, marks for spaces and for parts of words."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        model, parts = state["model"], [state[part] for part in ("normalizer", "pre_tokenizer", "decoder")]
        kinds = {kind for part in parts for kind in _types(part)}
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = bool(model.get("byte_fallback")) or "ByteFallback" in kinds
        self.space = "▁" if kinds & {"Metaspace", "Replace"} else ""
        self.inner = model.get("continuing_subword_prefix") or ""  # in front of tokens that continue a word
        self.last = model.get("end_of_word_suffix") or ""  # after tokens that end a word; decoded as a space

    def n_bytes(self, token: str) -> int:
        """UTF-8 bytes of the text that a token of the vocabulary stands for."""
        if self.byte_level:
            return len(token)
        if self.byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return 1
        if self.space:
            token = token.replace(self.space, " ")
        if self.last and token.endswith(self.last):
            token = token.removesuffix(self.last) + " "
        return len((token.removeprefix(self.inner) if self.inner else token).encode())


def _types(part: object) -> list[str]:
    """The types of all components of a part of tokenizer.json."""
    if isinstance(part, dict):
        inner = [kind for value in part.values() for kind in _types(value)]
        return [part["type"], *inner] if isinstance(part.get("type"), str) else inner
    return [kind for value in part for kind in _types(value)] if isinstance(part, list) else []
