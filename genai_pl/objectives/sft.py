"""Supervised fine-tuning: next-token prediction of the answers only, whole conversations packed into rows."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from genai_pl.objectives.clm import next_token_batch
from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class SFTCollator(Collator):
    """Batches as in causal language modelling, where only tokens whose `loss_mask` (n,) is True are predicted."""

    def __init__(self, *, vocabulary: SpecialTokens, seed: int = 0) -> None:
        self.pad = vocabulary.pad  # and nothing is drawn

    def row_length(self, seq_len: int) -> int:
        """One more than the model reads: the last token is only predicted. Rows do not overlap."""
        return seq_len + 1

    def __call__(self, rows: Sequence[Example]) -> Batch:
        ids, segments = [row["input_ids"] for row in rows], [row["segment_ids"] for row in rows]
        batch = next_token_batch(ids, segments, pad=self.pad)
        learned = pad_rows([row["loss_mask"] for row in rows], 0)[:, 1:] > 0  # (B, T)
        labels = torch.where(learned, batch["labels"], IGNORED)
        return {**batch, "labels": labels, "targets": (labels != IGNORED).sum().float()}


def pack(lengths: Sequence[int] | np.ndarray, room: int) -> list[list[int]]:
    """The numbers of the examples that share a row of `room` tokens: each goes, the longest first, where least is left over.

    Best-fit decreasing needs at most 11/9 of the fewest rows (Johnson 1974); lengths of text leave next to nothing
    empty. Each length must lie between 1 and room.
    """
    lengths = np.asarray(lengths, np.int64)
    assert ((lengths >= 1) & (lengths <= room)).all()
    bins: list[list[int]] = []
    open_bins: defaultdict[int, list[int]] = defaultdict(list)  # by the room that they have left
    rooms: list[int] = []  # the keys that have bins, sorted: at most `room` of them, however many bins there are
    order = np.argsort(-lengths, kind="stable")
    for example, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, left = len(bins), room - length
            bins.append([])
        else:
            number, left = open_bins[rooms[place]].pop(), rooms[place] - length
            if not open_bins[rooms[place]]:
                del rooms[place]
        bins[number].append(example)
        if left:
            if not open_bins[left]:
                insort(rooms, left)
            open_bins[left].append(number)
    return bins
