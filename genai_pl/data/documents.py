"""Documents become tokens: split into training and validation text, tokenized in parallel, cached by content."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genai_pl.data.tokenizer import end_token, fingerprint
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 16  # characters; a long document is tokenized in pieces so that cores share it


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
    name = hashlib.blake2b(f"2/{content}/{fingerprint(tokenizer)}/{end}".encode(), digest_size=8).hexdigest()
    return documents.map(
        encode_batch,
        batched=True,
        batch_size=256,
        fn_kwargs={"tokenizer": tokenizer, "end": end},
        remove_columns=documents.column_names,
        new_fingerprint=name,
        cache_file_name=str(cache_folder() / f"tokens-{name}.arrow"),
        desc="tokenizing",
    )


def encode_batch(
    batch: dict[str, list[str]], tokenizer: "PreTrainedTokenizerBase", end: list[int]
) -> dict[str, list[np.ndarray]]:
    """Token ids of each text of the batch; the pieces of all texts are encoded in parallel."""
    pieces = [split_pieces(text or "") for text in batch["text"]]
    flat = [piece for document in pieces for piece in document]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    rows = []
    for document in pieces:
        ids = [np.asarray(next(encoded).ids, dtype=np.int32) for _ in document]
        rows.append(np.concatenate([*ids, np.asarray(end, dtype=np.int32)]))
    return {"input_ids": rows}


def split_pieces(text: str) -> list[str]:
    """The text in pieces of about PIECE characters that begin after a line break; a shorter text is one piece."""
    pieces, start = [], 0
    while len(text) - start > PIECE:
        cut = text.find("\n", start + PIECE)
        if cut < 0:
            break
        pieces.append(text[start : cut + 1])
        start = cut + 1
    return [*pieces, text[start:]] if start < len(text) else pieces


def cache_folder() -> Path:
    """Where token tables are kept: beside the tables of `datasets`."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "genai_pl"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
