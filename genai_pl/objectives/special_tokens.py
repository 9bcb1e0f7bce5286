"""What an objective must know of a tokenizer: plain numbers, so that objectives need no tokenizer."""

from typing import NamedTuple

import numpy as np


class SpecialTokens(NamedTuple):
    """Token ids with a meaning, and what each of the `size` ids stands for; a token that does not exist is None."""

    size: int  # of the model, which may exceed the tokenizer's
    pad: int = 0
    start: int | None = None  # what a decoder beside an encoder begins with; null: the pad token
    end: int | None = None  # closes a document
    mask: int | None = None
    sentinels: tuple[int, ...] = ()  # <extra_id_0>, <extra_id_1>, ...
    fim: tuple[int, int, int] | None = None  # prefix, middle, suffix
    special: np.ndarray = np.zeros(0, bool)  # (size,) True where a token is no text
    starts_word: np.ndarray = np.zeros(0, bool)  # (size,) True where a token begins a word
    n_bytes: np.ndarray = np.zeros(0, np.int64)  # (size,) UTF-8 bytes of text that a token stands for

    @property
    def first(self) -> int:
        """What a decoder beside an encoder begins with."""
        return self.pad if self.start is None else self.start
