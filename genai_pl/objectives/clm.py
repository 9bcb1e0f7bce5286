"""Causal language modelling: every token is predicted from those before it."""

from collections.abc import Sequence

import numpy as np
import torch

from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows, with_segments
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED, token_loss

ANY = SpecialTokens(size=0)
causal_lm_loss = token_loss  # labels[t] is what position t should predict


class CausalLMCollator(Collator):
    """Rows of T + 1 tokens become input_ids and labels (B, T); segment_ids only where a row has padding or two documents.

    Of a row with a `loss_mask` (n,) only tokens where it is True are targets.
    """

    overlap = 1

    def __init__(self, *, vocabulary: SpecialTokens = ANY, seed: int = 0) -> None:
        self.pad = vocabulary.pad  # and nothing is drawn

    def __call__(self, rows: Sequence[Example]) -> Batch:
        ids, segments = [row["input_ids"] for row in rows], [row["segment_ids"] for row in rows]
        batch = next_token_batch(ids, segments, pad=self.pad)
        if not any("loss_mask" in row for row in rows):
            return batch
        # rows of conversations learn what their mask says, rows of text everything
        masks = [row.get("loss_mask", np.ones(len(row["input_ids"]))) for row in rows]
        labels = torch.where(pad_rows(masks, 0)[:, 1:] > 0, batch["labels"], IGNORED)  # (B, T)
        return {**batch, "labels": labels, "targets": (labels != IGNORED).sum().float()}


def next_token_batch(ids: Sequence[np.ndarray], segments: Sequence[np.ndarray], *, pad: int) -> Batch:
    """A batch in which position t of T predicts token t + 1 of T + 1, unless that belongs to another document."""
    tokens, documents = pad_rows(ids, pad), pad_rows(segments, 0)  # (B, T + 1)
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] > 0)
    labels = torch.where(same, tokens[:, 1:], IGNORED)
    batch = {"input_ids": tokens[:, :-1], "labels": labels, "targets": same.sum().float()}
    return with_segments(batch, documents[:, :-1])
