"""Completions that a policy writes in training, as the batches that it learns from."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from genai_pl.generation.decode import decode
from genai_pl.generation.text import left_pad
from genai_pl.modules.base import Batch
from genai_pl.objectives import IGNORED
from genai_pl.objectives.preference_collators import completions_batch
from genai_pl.specs import GenerationConfig

Reward = Callable[..., Sequence[float]]  # (prompts, completions, **columns) -> one number each


class Rollout(NamedTuple):
    """What was written: rows of prompt and completion, the completions' tokens, and which of them ended."""

    batch: Batch  # input_ids, labels, segment_ids (N, T)
    completions: list[list[int]]
    ended: Tensor  # (N,)

    @property
    def mask(self) -> Tensor:
        """Which labels (N, T) are tokens of completions."""
        return self.batch["labels"] != IGNORED


class Example(NamedTuple):
    """One completion as people read it."""

    prompt: str
    completion: str
    score: float
    kl: float  # distance to the reference, summed over its tokens


class Judged(NamedTuple):
    """A rollout with its texts and what they are worth."""

    rollout: Rollout
    prompts: list[str]
    completions: list[str]
    scores: Tensor  # (N,)

    def examples(self, kl: Tensor, n: int) -> list[Example]:
        """The first n of them; kl is (N,)."""
        columns = (self.prompts[:n], self.completions[:n], self.scores[:n].tolist(), kl[:n].tolist())
        return [Example(*row) for row in zip(*columns, strict=True)]


@torch.no_grad()
def write(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    config: GenerationConfig,
    *,
    generator: torch.Generator,
    end: int,
    pad: int,
) -> Rollout:
    """One completion of each prompt, drawn by the policy in evaluation mode; each ends with the end token or is cut."""
    device = next(model.parameters()).device
    input_ids, segment_ids = left_pad([row.tolist() for row in prompts], pad, device=device)
    steps = decode(
        model, input_ids, config, segment_ids=segment_ids, generator=generator, eos_token_id=end, pad_token_id=pad
    )
    written = torch.stack(list(steps), dim=1).tolist()  # (N, n)
    completions = [row[: row.index(end) + 1] if end in row else row for row in written]
    rows = [[(prompt, np.asarray(row))] for prompt, row in zip(prompts, completions, strict=True)]
    batch = {name: x.to(device) for name, x in completions_batch(rows, pad).items()}
    ended = torch.tensor([row[-1] == end for row in completions], device=device)
    return Rollout(batch, completions, ended)
