"""Collation of pairs for contrastive learning."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch

from genai_pl.errors import DataError
from genai_pl.objectives.collate import Batch, Collator, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens


class PairCollator(Collator):
    """input_ids and segment_ids of [anchors; positives; negatives], (2B or 3B, T), and targets = B.

    Examples are {"anchor": ids, "positive": ids, "negative": ids}. Without a positive the anchor is its own (SimCSE);
    negatives are given for all examples or for none. Equal text_ids (B or 2B,) of positives, then negatives, mark equal
    texts, and anchor_ids (B,) those of the anchors.

    prompt: text in front of each text. max_length: tokens of a text at most. add_end: append an end token where the
    tokenizer does not. All three are set by the module, from the sentence head of the model.
    """

    prompt: str = ""
    max_length: int | None = None
    add_end: bool = True

    def __init__(self, *, vocabulary: SpecialTokens, seed: int = 0) -> None:
        self.pad = vocabulary.pad  # and nothing is drawn: the noise of SimCSE is dropout

    def __call__(self, rows: Sequence[dict[str, np.ndarray]]) -> Batch:
        anchors = [row["anchor"] for row in rows]
        candidates = [row.get("positive", row["anchor"]) for row in rows]
        negatives = [row["negative"] for row in rows if "negative" in row]
        if len(negatives) not in (0, len(rows)):
            raise DataError(f"pairs: {len(negatives)} of {len(rows)} rows have a negative; give one to all or to none")
        candidates += negatives
        texts = anchors + candidates
        return {
            "input_ids": pad_rows(texts, self.pad),
            "segment_ids": pad_rows([np.ones(len(text)) for text in texts], 0),
            "text_ids": torch.tensor([_text_id(text) for text in candidates]),
            "anchor_ids": torch.tensor([_text_id(text) for text in anchors]),
            "targets": torch.tensor(float(len(rows))),
        }


def _text_id(ids: np.ndarray) -> int:
    """A hash of the token ids, 64 bits."""
    digest = blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
