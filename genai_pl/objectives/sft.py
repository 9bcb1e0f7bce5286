"""Supervised fine-tuning: next-token prediction of the answers only, in packed rows of whole conversations."""

from collections.abc import Sequence

import torch

from genai_pl.objectives.clm import next_token_batch
from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class SFTCollator(Collator):
    """Batches of causal language modelling in which only tokens whose `loss_mask` (n,) is True are targets."""

    def __init__(self, *, vocabulary: SpecialTokens, seed: int = 0) -> None:
        self.pad = vocabulary.pad  # and nothing is drawn

    def row_length(self, seq_len: int) -> int:
        """seq_len + 1: the last token is only predicted. Rows do not overlap, as examples stay whole."""
        return seq_len + 1

    def __call__(self, rows: Sequence[Example]) -> Batch:
        ids, segments = [row["input_ids"] for row in rows], [row["segment_ids"] for row in rows]
        batch = next_token_batch(ids, segments, pad=self.pad)
        is_target = pad_rows([row["loss_mask"] for row in rows], 0)[:, 1:] > 0  # (B, T)
        labels = torch.where(is_target, batch["labels"], IGNORED)
        return {**batch, "labels": labels, "targets": (labels != IGNORED).sum().float()}
