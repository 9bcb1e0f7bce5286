"""Sequence to sequence: an encoder reads the source, a decoder produces the target."""

from collections.abc import Sequence

import numpy as np

from genai_pl.objectives.collate import Batch, Collator, Example, missing_token_error, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class Seq2SeqCollator(Collator):
    """input_ids (B, S), decoder_input_ids and labels (B, T) of rows of one pair, or of several that do not see each other.

    Examples are {"source": (S,), "source_segments": (S,), "target": (T,), "target_segments": (T,)}; texts end with the end
    token, and the decoder begins each target with the start token, T5's pad (Raffel et al. 2020). segment_ids and
    decoder_segment_ids are present only where a row has padding or two pairs.
    """

    def __init__(self, *, vocabulary: SpecialTokens, seed: int = 0) -> None:
        if vocabulary.end is None:
            raise missing_token_error("seq2seq", "an end-of-text token")
        self.pad, self.start = vocabulary.pad, vocabulary.first  # and nothing is drawn

    def __call__(self, rows: Sequence[Example]) -> Batch:
        labels = pad_rows([row["target"] for row in rows], IGNORED)
        segments = pad_rows([row["source_segments"] for row in rows], 0)
        decoder_segments = pad_rows([row["target_segments"] for row in rows], 0)
        batch = {
            "input_ids": pad_rows([row["source"] for row in rows], self.pad),
            "decoder_input_ids": pad_rows([self._shifted(row) for row in rows], self.pad),
            "labels": labels,
            "targets": (labels != IGNORED).sum().float(),
        }
        if (segments == 1).all() and (decoder_segments == 1).all():
            return batch
        return {**batch, "segment_ids": segments, "decoder_segment_ids": decoder_segments}

    def _shifted(self, row: Example) -> np.ndarray:
        """The decoder's input: each target shifted right by one, after the start token."""
        target, segments = row["target"], row["target_segments"]
        first = np.diff(segments, prepend=0) > 0
        return np.where(first, self.start, np.roll(target, 1))
