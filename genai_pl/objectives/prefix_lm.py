"""Prefix language modelling: the beginning is read bidirectionally, the rest is predicted (Raffel et al. 2020, 3.2)."""

from collections.abc import Sequence

import torch

from genai_pl.objectives.clm import next_token_batch
from genai_pl.objectives.collate import Batch, Collator, Example, row_rng
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class PrefixLMCollator(Collator):
    """A causal batch with prefix (B,): that many tokens see each other, and labels begin with the token after them.

    The prefix is drawn from the row's first document, 1 to n - 1 of its n tokens uniformly, so at least one target is left.
    Documents that follow in the row have no prefix: all their tokens are predicted, from those before.
    """

    overlap = 1

    def __init__(self, *, vocabulary: SpecialTokens, seed: int) -> None:
        self.vocabulary, self.seed = vocabulary, seed

    def __call__(self, rows: Sequence[Example]) -> Batch:
        ids, segments = [row["input_ids"] for row in rows], [row["segment_ids"] for row in rows]
        batch = next_token_batch(ids, segments, pad=self.vocabulary.pad)
        prefix = torch.tensor([self._prefix(row) for row in rows])
        position = torch.arange(batch["labels"].shape[1])
        known = position < prefix[:, None] - 1  # (B, T); the last token of the prefix predicts the first target
        labels = batch["labels"].masked_fill(known, IGNORED)
        return {**batch, "labels": labels, "prefix": prefix, "targets": (labels != IGNORED).sum().float()}

    def _prefix(self, row: Example) -> int:
        """The length of a row's prefix; 1 is a causal row."""
        n = int((row["segment_ids"] == row["segment_ids"][0]).sum())
        return int(row_rng(self.seed, row).integers(1, max(n, 2)))  # 1 sees what a causal row sees
