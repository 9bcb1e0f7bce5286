"""Tokens of words: sentences that are lists of words, tokenized as text, and the word that begins at each token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize_words(
    batch: dict[str, list[list[str]]], tokenizer: "PreTrainedTokenizerBase", seq_len: int | None
) -> dict[str, list[list[int]]]:
    """`input_ids` of each sentence, its words joined by spaces, and `words`: the word that begins at each token, or -1."""
    texts = [" ".join(words) for words in batch["tokens"]]
    limits = {} if seq_len is None else {"truncation": True, "max_length": seq_len}
    encoded = tokenizer(texts, **limits, return_offsets_mapping=True, verbose=False)
    begins = [
        word_beginnings(words, offsets)
        for words, offsets in zip(batch["tokens"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "words": begins}


def word_beginnings(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token the number of the word whose first token it is, else -1; special tokens have an empty span.

    offsets: (first, end) characters of each token in the words joined by spaces. A token may hold the space before its word, so
    its last character decides.

    >>> word_beginnings(["ab", "c"], [(0, 0), (0, 1), (1, 2), (2, 4)])
    [-1, 0, -1, 1]
    """
    word_of = [n for n, word in enumerate(words) for _ in range(len(word) + 1)]  # of each character, its space included
    seen, begins = -1, []
    for first, end in offsets:
        word = word_of[end - 1] if end > first else -1
        is_new = word > seen
        begins.append(word if is_new else -1)
        seen = word if is_new else seen
    return begins
