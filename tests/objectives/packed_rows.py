"""A small vocabulary, and rows of it as the packer makes them."""

import numpy as np

from genai_pl.objectives import SpecialTokens

TEXT = 880  # ids below are text
SENTINELS = tuple(range(990, 890, -1))
END, MASK, PAD = 998, 997, 999
PREFIX, MIDDLE, SUFFIX = 994, 995, 996
SIZE = 1000

VOCABULARY = SpecialTokens(
    size=SIZE,
    pad=PAD,
    end=END,
    mask=MASK,
    sentinels=SENTINELS,
    fim=(PREFIX, MIDDLE, SUFFIX),
    special=np.arange(SIZE) >= TEXT,
    starts_word=np.arange(SIZE) % 3 == 0,
)
BARE = SpecialTokens(size=SIZE, special=np.zeros(SIZE, bool))


def row(length: int, index: int = 0, *, epoch: int = 0, documents: tuple[int, ...] = ()) -> dict:
    """Random text; `documents` are lengths of documents that end in the row, their end token included."""
    ids = np.random.default_rng(1000 + index).integers(0, TEXT, length)
    segments = np.ones(length, np.int64)
    for border in np.cumsum(documents, dtype=np.int64):
        ids[border - 1] = END
        segments[border:] += 1
    ids.flags.writeable = False  # as in a memory-mapped table
    return {"input_ids": ids, "segment_ids": segments, "key": (epoch, index)}


def rows(n: int, length: int, **options) -> list[dict]:
    return [row(length, index, **options) for index in range(n)]
