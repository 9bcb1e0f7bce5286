"""Process reward: the loss of a model that scores each step of an answer, and the collator of its batches."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.objectives.collate import Batch, Collator, Example, pad_rows
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class StepCollator(Collator):
    """input_ids, segment_ids and labels (B, T), float32 and -100 where no step ends, and targets, the number of labels.

    Examples are {"input_ids": ids, "labels": numbers}.
    """

    def __init__(self, *, vocabulary: SpecialTokens) -> None:
        self.pad = vocabulary.pad

    def __call__(self, rows: Sequence[Example]) -> Batch:
        input_ids = pad_rows([row["input_ids"] for row in rows], self.pad)
        labels = torch.full(input_ids.shape, float(IGNORED))
        for target, row in zip(labels, rows, strict=True):
            target[: len(row["labels"])] = torch.from_numpy(row["labels"])
        return {
            "input_ids": input_ids,
            "segment_ids": pad_rows([np.ones(len(row["input_ids"])) for row in rows], 0),
            "labels": labels,
            "targets": (labels != IGNORED).sum().float(),
        }


def process_reward_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-sum y log r + (1 - y) log(1 - r) over steps (N,), r = softmax(logits)[1] (Wang et al. 2024, Math-Shepherd, eq. 2).

    logits: (N, 2), of incorrect and correct. labels: (N,) from 0 to 1: hard labels, or estimates of how often an answer that
    goes on from the step is right.
    """
    return F.cross_entropy(logits, torch.stack([1 - labels, labels], dim=-1), reduction="sum")


@torch.no_grad()
def step_hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts: steps on the right side of one half, incorrect steps (label below one half) that are found, and incorrect steps.

    >>> step_hits(torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 0.0]]), torch.tensor([1.0, 0.0, 0.0]))
    (tensor(2), tensor(1), tensor(2))
    """
    predicted, correct = logits.argmax(-1) == 1, labels >= 0.5
    return (predicted == correct).sum(), (~predicted & ~correct).sum(), (~correct).sum()
