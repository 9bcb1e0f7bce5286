"""Special tokens: the plain numbers that objectives need of a tokenizer, so that they need no tokenizer."""

from typing import NamedTuple

import numpy as np


class SpecialTokens(NamedTuple):
    """Ids of special tokens, and properties of each of the `size` ids; a token that does not exist is None.

    size: of the model's vocabulary, which may exceed the tokenizer's. pad: fills rows. start: begins a decoder beside an
    encoder; None is the pad token. end: closes a document. mask: hides a token. sentinels: <extra_id_0>, <extra_id_1>, ...
    fim: prefix, middle and suffix tokens.
    special: (size,) True where an id is no text. starts_word: (size,) True where a token begins a word.
    n_bytes: (size,) UTF-8 bytes of text that a token stands for.
    """

    size: int
    pad: int = 0
    start: int | None = None
    end: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()
    fim: tuple[int, int, int] | None = None
    special: np.ndarray = np.zeros(0, bool)
    starts_word: np.ndarray = np.zeros(0, bool)
    n_bytes: np.ndarray = np.zeros(0, np.int64)

    @property
    def first(self) -> int:
        """The token with which a decoder beside an encoder begins."""
        return self.pad if self.start is None else self.start
