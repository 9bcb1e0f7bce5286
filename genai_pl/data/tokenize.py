"""Tokenization of documents: split into training and validation text, tokenized on all cores, cached by content.

A folder may hold one text of a gigabyte, which the Rust tokenizer would work on with one core. So documents are divided
into chunks that are tokenized in parallel. A chunk ends at a line end where that provably changes no token nearby; where
there is no such place (SentencePiece changes the beginning of every text) the document stays whole.
"""

import hashlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.data.table_store import cached_encoding
from genai_pl.data.tokenizer import end_token, fingerprint, without_truncation
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

EncodeText = Callable[[str], list[int]]
CHUNK = 1 << 16  # characters of a chunk
LINE_END = re.compile(r"(?<=\S)\r?\n(?=\S)")
MAX_TRIES = 64  # line ends that are tried for one split
CONTEXT_CHARACTERS = 256  # characters on both sides of a split whose tokens are compared


def split_text(documents: "Dataset", fraction: float) -> tuple["Dataset", "Dataset"]:
    """The first 1 - fraction of all characters as documents, and the rest; the document at the border is divided.

    DataError where either part would be empty.
    """
    from datasets import Dataset, concatenate_datasets

    lengths = _lengths(documents)
    n_train = int(lengths.sum() * (1 - fraction))
    border = int(np.searchsorted(np.cumsum(lengths), n_train, side="right"))
    if border >= len(documents) or not n_train:
        raise DataError("data.path: too little text to hold some back for validation; set data.val_path")
    text = documents[border]["text"]
    n_inside = n_train - int(lengths[:border].sum())
    # whole documents on both sides, and the two parts of the one at the border
    ranges = (0, border), (border + 1, len(documents))
    sides = [[documents.select(range(start, stop))] if start < stop else [] for start, stop in ranges]
    border_parts = [
        [Dataset.from_dict({"text": [part]})] if part else [] for part in (text[:n_inside], text[n_inside:])
    ]
    return concatenate_datasets([*sides[0], *border_parts[0]]), concatenate_datasets([*border_parts[1], *sides[1]])


def n_characters(documents: "Dataset") -> int:
    """The number of characters of all documents."""
    return int(_lengths(documents).sum())


def _lengths(documents: "Dataset") -> np.ndarray:
    """Characters of each document; a missing one has none."""
    import pyarrow.compute as pc

    return pc.utf8_length(pc.fill_null(documents.with_format("arrow")[:]["text"], "")).to_numpy()


def tokenize(
    documents: "Dataset", tokenizer: "PreTrainedTokenizerBase", *, content: str, end_of_text: bool = True
) -> "Dataset":
    """A table with a column `input_ids`, one row per document, each closed by the end token unless end_of_text=False.

    content: a name of what the documents say. The cache is found by it, the tokenizer's fingerprint and the end token.
    """
    end = [end_token(tokenizer)] if end_of_text and end_token(tokenizer) is not None else []
    name = hashlib.blake2b(f"4/{content}/{fingerprint(tokenizer)}/{end}".encode(), digest_size=8).hexdigest()
    return cached_encoding("tokens", name, documents, encode_batch, batch_size=256, tokenizer=tokenizer, end=end)


def encode_batch(
    batch: dict[str, list[str]], tokenizer: "PreTrainedTokenizerBase", end: list[int]
) -> dict[str, list[np.ndarray]]:
    """Token ids of each text of {"text": [...]}, each closed by `end`; the chunks of all texts are tokenized in parallel."""
    encode = chunk_encoder(without_truncation(tokenizer))  # a call with truncation leaves it switched on
    chunks = [split_chunks(text or "", encode) for text in batch["text"]]
    flat = [chunk for document in chunks for chunk in document]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    rows = []
    for document in chunks:
        ids = [np.asarray(next(encoded).ids, dtype=np.int32) for _ in document]
        rows.append(np.concatenate([*ids, np.asarray(end, dtype=np.int32)]))
    return {"input_ids": rows}


def chunk_encoder(tokenizer: "PreTrainedTokenizerBase") -> EncodeText | None:
    """A function from a short text to its ids; None for tokenizers without a pre-tokenizer, whose tokens may cross line ends."""
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return None
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def split_chunks(text: str, encode: EncodeText | None) -> list[str]:
    """The text in chunks of about CHUNK characters, whose tokens end to end are those of the whole.

    A chunk ends with a line whose next line begins without white space: white space on both sides of a split may be one
    token. Whether the tokens around a split change is tried, not assumed.

    >>> split_chunks("short", None)
    ['short']
    """
    chunks, start = [], 0
    while len(text) - start > CHUNK:
        split = find_split(text, start + CHUNK, encode)
        if split is None:
            break
        chunks.append(text[start:split])
        start = split
    return [*chunks, text[start:]] if start < len(text) else chunks


def find_split(text: str, first: int, encode: EncodeText | None) -> int | None:
    """The first position from `first` on where a split changes no token nearby; None if none of the first MAX_TRIES does."""
    if encode is None:
        return None
    for match, _ in zip(LINE_END.finditer(text, first), range(MAX_TRIES), strict=False):
        split = match.end()
        before, after = text[split - CONTEXT_CHARACTERS : split], text[split : split + CONTEXT_CHARACTERS]
        if encode(before + after) == encode(before) + encode(after):
            return split
    return None
