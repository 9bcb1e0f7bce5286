"""Documents become tokens: split into training and validation text, tokenized in parallel, cached by content."""

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
CHUNK = 1 << 16  # characters; a long document is tokenized in pieces so that cores share it
LINE_END = re.compile(r"(?<=\S)\r?\n(?=\S)")
MAX_TRIES = 64  # line ends that are tried for a cut
CONTEXT_CHARACTERS = 256  # characters on both sides of a cut whose tokens are compared


def split_text(documents: "Dataset", fraction: float) -> tuple["Dataset", "Dataset"]:
    """The first 1 - fraction of all characters, and the rest; the document on the border is cut in two."""
    from datasets import Dataset, concatenate_datasets

    lengths = _lengths(documents)
    cut = int(lengths.sum() * (1 - fraction))
    border = int(np.searchsorted(np.cumsum(lengths), cut, side="right"))
    if border >= len(documents) or not cut:
        raise DataError("data.path: too little text to hold some back for validation; set data.val_path")
    text = documents[border]["text"]
    inside = cut - int(lengths[:border].sum())
    ranges = (0, border), (border + 1, len(documents))
    whole = [[documents.select(range(start, stop))] if start < stop else [] for start, stop in ranges]
    halves = [[Dataset.from_dict({"text": [part]})] if part else [] for part in (text[:inside], text[inside:])]
    return concatenate_datasets([*whole[0], *halves[0]]), concatenate_datasets([*halves[1], *whole[1]])


def n_characters(documents: "Dataset") -> int:
    """Characters of all documents."""
    return int(_lengths(documents).sum())


def _lengths(documents: "Dataset") -> np.ndarray:
    import pyarrow.compute as pc

    return pc.utf8_length(pc.fill_null(documents.with_format("arrow")[:]["text"], "")).to_numpy()


def tokenize(
    documents: "Dataset", tokenizer: "PreTrainedTokenizerBase", *, content: str, end_of_text: bool = True
) -> "Dataset":
    """A table with a column `input_ids`, one row a document, each closed by the end-of-text token.

    `content` names what the documents say: the cache is found again by it, the tokenizer and these options.
    """
    end = [end_token(tokenizer)] if end_of_text and end_token(tokenizer) is not None else []
    name = hashlib.blake2b(f"4/{content}/{fingerprint(tokenizer)}/{end}".encode(), digest_size=8).hexdigest()
    return cached_encoding("tokens", name, documents, encode_batch, batch_size=256, tokenizer=tokenizer, end=end)


def encode_batch(
    batch: dict[str, list[str]], tokenizer: "PreTrainedTokenizerBase", end: list[int]
) -> dict[str, list[np.ndarray]]:
    """Token ids of each text of the batch; the pieces of all texts are encoded in parallel."""
    encode = chunk_encoder(without_truncation(tokenizer))  # which a call that cuts may have left behind
    pieces = [split_chunks(text or "", encode) for text in batch["text"]]
    flat = [piece for document in pieces for piece in document]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    rows = []
    for document in pieces:
        ids = [np.asarray(next(encoded).ids, dtype=np.int32) for _ in document]
        rows.append(np.concatenate([*ids, np.asarray(end, dtype=np.int32)]))
    return {"input_ids": rows}


def chunk_encoder(tokenizer: "PreTrainedTokenizerBase") -> EncodeText | None:
    """Tokens of a short text; None for tokenizers without a pre-tokenizer, whose tokens may reach from line to line."""
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return None
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def split_chunks(text: str, encode: EncodeText | None) -> list[str]:
    """The text in pieces of about CHUNK characters whose tokens, end to end, are those of the whole; a short text is one.

    A piece ends with a line whose neighbour begins right after it: white space on both sides of a cut may be one token.
    Whether the tokens around a cut are the same with and without it is tried: they are not where a tokenizer changes the
    beginning of every text, as SentencePiece's do.
    """
    pieces, start = [], 0
    while len(text) - start > CHUNK:
        cut = find_split(text, start + CHUNK, encode)
        if cut is None:
            break
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]] if start < len(text) else pieces


def find_split(text: str, first: int, encode: EncodeText | None) -> int | None:
    """The first place from `first` on where the text can be cut; None if there is none, or the first few do not do."""
    if encode is None:
        return None
    for match, _ in zip(LINE_END.finditer(text, first), range(MAX_TRIES), strict=False):
        cut = match.end()
        before, after = text[cut - CONTEXT_CHARACTERS : cut], text[cut : cut + CONTEXT_CHARACTERS]
        if encode(before + after) == encode(before) + encode(after):
            return cut
    return None
