"""Token boundaries: tokens of a text that is known to consist of a prompt and what follows it.

Tokenizing "prompt" + "answer" at once may give other tokens than tokenizing the prompt alone: a merge may reach over
the boundary. A model in use is prompted with the latter, so training on the former would train on tokens that it never
sees. Here a boundary is kept exactly where it matters, and elsewhere the whole text is tokenized at once, as
transformers does.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_WARNINGS = {"verbose": False}  # callers truncate or refuse long texts themselves
CONTEXT_CHARACTERS = 64  # characters on both sides of a boundary whose tokens are compared
Tokens = tuple[list[int], np.ndarray]  # ids (n,), and the character at which each token begins (n,)


def encode_continuations(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that continue others, without the space that SentencePiece puts before every text."""
    return [ids for ids, _ in _encode(tokenizer, texts, continues=True)]


def encode_with_boundaries(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[tuple[str, Sequence[int]]]
) -> list[Tokens]:
    """Tokens of each text, split at those prompt ends where the prompt alone has other tokens.

    texts: (text, character positions at which prompts end).
    """
    encoded = _encode(tokenizer, [text for text, _ in texts], continues=False)
    known: dict[tuple[str, str], bool] = {}
    rows = []
    for (text, ends), (ids, starts) in zip(texts, encoded, strict=True):
        boundaries = [end for end in ends if 0 < end < len(text) and _is_boundary(tokenizer, text, end, starts, known)]
        rows.append(_encode_parts(tokenizer, text, boundaries) if boundaries else (ids, starts))
    return rows


def _is_boundary(
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    end: int,
    starts: np.ndarray,
    known: dict[tuple[str, str], bool],
) -> bool:
    """Whether the prompt has other tokens in front of its answer than alone.

    Decided by CONTEXT_CHARACTERS on both sides of the boundary, and remembered: conversations repeat the same few headers.
    """
    index = int(np.searchsorted(starts, end))
    if index == len(starts) or starts[index] != end:  # a token reaches over the boundary
        return True
    key = text[max(0, end - CONTEXT_CHARACTERS) : end], text[end]
    if key not in known:
        after = text[end : end + CONTEXT_CHARACTERS]
        together, before = (ids for ids, _ in _encode(tokenizer, [key[0] + after, key[0]], continues=False))
        known[key] = together[: len(before)] != before
    return known[key]


def _encode_parts(tokenizer: "PreTrainedTokenizerBase", text: str, boundaries: Sequence[int]) -> Tokens:
    """The tokens of the parts of a text, end to end."""
    first, *others = (text[start:stop] for start, stop in zip([0, *boundaries], [*boundaries, None], strict=True))
    parts = [*_encode(tokenizer, [first], continues=False), *_encode(tokenizer, others, continues=True)]
    ids = [i for part, _ in parts for i in part]
    starts = [begin + start for begin, (_, start) in zip([0, *boundaries], parts, strict=True)]
    return ids, np.concatenate(starts)


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, continues: bool) -> list[Tokens]:
    """The tokens of each text; of one that `continues` another, the tokens that it has after a line break.

    No merge reaches over a line break, so the tokens after it are those of a continuation.
    """
    if not texts:
        return []
    plain = _tokens(tokenizer, texts)
    if not continues:
        return plain
    (line_break, _), (letter, _), (both, _) = _tokens(tokenizer, ["\n", "a", "\na"])
    if both == line_break + letter:  # this tokenizer does not treat the beginning of a text specially
        return plain
    after = _tokens(tokenizer, ["\n" + text for text in texts])
    n = len(line_break)
    return [
        (ids[n:], starts[n:] - 1) if ids[:n] == line_break else alone
        for (ids, starts), alone in zip(after, plain, strict=True)
    ]


def _tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Tokens]:
    """Ids and first characters of the tokens of each text, without special tokens."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, **NO_WARNINGS)
    rows = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [(ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 0]) for ids, offsets in rows]
