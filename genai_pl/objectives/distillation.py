"""Distillation: a student learns the teacher's distribution of the next token, on the data or on its own completions.

The loss is in `genai_pl/kernels/distillation.py`, beside the chunks that it is computed in. Here are the batches: which rows
the student answers itself (generalized knowledge distillation, Agarwal et al. 2024), and how data and completions are read
together.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.objectives.clm import CausalLMCollator
from genai_pl.objectives.collate import Batch, Example, row_rng
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class DistillCollator(CausalLMCollator):
    """Batches of causal language modelling, of texts or conversations, with what distillation draws for each row.

    student_fraction: share of rows whose completions the student writes itself. Batches also have `rows` (B,), the number of
    each row in the data, `on_policy` (B,), whether the student answers it, and `sample_seed` (), of what it writes.
    """

    def __init__(self, *, vocabulary: SpecialTokens, seed: int, student_fraction: float = 0.0) -> None:
        super().__init__(vocabulary=vocabulary, seed=seed)
        self.seed, self.student_fraction = seed, student_fraction

    def __call__(self, rows: Sequence[Example]) -> Batch:
        generators = [row_rng(self.seed, row) for row in rows]
        on_policy = [generator.random() < self.student_fraction for generator in generators]
        return {
            **super().__call__(rows),
            "rows": torch.tensor([row["key"][1] for row in rows]),
            "on_policy": torch.tensor(on_policy),
            "sample_seed": torch.tensor(int(generators[0].integers(2**62))),
        }


def prompts_of_row(input_ids: Tensor, labels: Tensor, segments: Tensor, *, text_tokens: int) -> list[np.ndarray]:
    """The prompt of each document of a row (T,): its tokens up to the first label, or the first text_tokens of a text.

    A document without labels, and a text of no more than text_tokens, has none.
    """
    prompts = []
    for number in range(1, int(segments.max()) + 1):
        places = (segments == number).nonzero()[:, 0]
        labelled = places[labels[places] != IGNORED]
        if not len(labelled):
            continue
        first, last = int(places[0]), int(labelled[0])
        if last == first:  # a text: every token is learned
            last += text_tokens - 1
        if last <= int(labelled[-1]):
            prompts.append(input_ids[first : last + 1].cpu().numpy())
    return prompts


def join_batches(first: Batch, second: Batch, *, pad: int) -> Batch:
    """The rows of two batches, filled on the right to the longer ones: input_ids, labels and segment_ids."""
    fillers = {"input_ids": pad, "labels": IGNORED, "segment_ids": 0}
    width = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    return {
        name: torch.cat([F.pad(x[name], (0, width - x[name].shape[1]), value=fill) for x in (first, second)])
        for name, fill in fillers.items()
    }
