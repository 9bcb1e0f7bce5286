"""Permutation language modelling: tokens are predicted in a random order (Yang et al. 2019, 2.2 and 2.3)."""

from collections.abc import Sequence

import numpy as np

from genai_pl.errors import ConfigError
from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows, row_rng, with_segments
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class PermutationCollator(Collator):
    """input_ids and order (B, T), target_positions and labels (B, M): the targets, their positions, and the order.

    predict_fraction: the last tokens of a random order are targets, 1 / K with K = 6 in the paper. max_span: targets are
    spans of 1 to max_span tokens, each within a context of K times its length (3.1 there).

    Tokens that are no targets have rank 0 in `order` and see themselves; targets have ranks from 1 on and see all lower
    ones. Special tokens are never targets, so a row may have fewer than M; position 0 without a label fills up.
    """

    def __init__(
        self, *, vocabulary: SpecialTokens, seed: int, predict_fraction: float = 1 / 6, max_span: int = 5
    ) -> None:
        if not 0 < predict_fraction <= 1:
            raise ConfigError(f"objective.predict_fraction must lie in (0, 1], not {predict_fraction}")
        if max_span < 1:
            raise ConfigError(f"objective.max_span must be at least 1, not {max_span}")
        self.vocabulary, self.seed = vocabulary, seed
        self.predict_fraction, self.max_span = predict_fraction, max_span

    def __call__(self, rows: Sequence[Example]) -> Batch:
        draws = [self._draw(row) for row in rows]
        ids = [row["input_ids"] for row in rows]
        positions = [positions for positions, _ in draws]
        M = self._n_targets(max(len(row) for row in ids))
        labels = pad_rows([row[where] for row, where in zip(ids, positions, strict=True)], IGNORED, length=M)
        batch = {
            "input_ids": pad_rows(ids, self.vocabulary.pad),
            "order": pad_rows([order for _, order in draws], 0),
            "target_positions": pad_rows(positions, 0, length=M),
            "labels": labels,
            "targets": (labels != IGNORED).sum().float(),
        }
        return with_segments(batch, pad_rows([row["segment_ids"] for row in rows], 0))

    def _n_targets(self, n_tokens: int) -> int:
        """The number of targets among n_tokens, at least one."""
        return max(1, int(n_tokens * self.predict_fraction + 1e-6))

    def _draw(self, row: Example) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the targets, and the rank of every position."""
        rng = row_rng(self.seed, row)
        text = np.flatnonzero(~self.vocabulary.special[row["input_ids"]])
        order = np.zeros(len(row["input_ids"]), np.int64)
        if len(text) == 0:
            return text, order
        positions = text[self._spans(len(text), rng)]
        order[positions] = 1 + rng.permutation(len(positions))
        return positions, order

    def _spans(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Which of n tokens are targets, (m,), ascending."""
        m = self._n_targets(n)
        ends = np.cumsum(rng.integers(1, self.max_span, size=m, endpoint=True))
        ends = np.append(ends[ends < m], m)  # the last span may be shorter
        lengths = np.diff(ends, prepend=0)
        stops = np.minimum((ends / self.predict_fraction + 1e-6).astype(np.int64), n)  # of the contexts
        first = rng.integers(np.append(0, stops[:-1]), stops - lengths, endpoint=True)
        positions = np.repeat(first - (ends - lengths), lengths) + np.arange(m)
        # edges of contexts are seldom targets: shift them, or edges of rows would seldom be
        return np.sort((positions + rng.integers(n)) % n)
