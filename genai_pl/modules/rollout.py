"""Completions that a policy writes in training, as the batches that it learns from."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.decode import decode
from genai_pl.generation.text import left_pad
from genai_pl.modules.base import Batch
from genai_pl.objectives import IGNORED
from genai_pl.objectives.preference_collators import groups_batch

Experience = dict[str, Tensor]  # (R, ...) of rows, or (N, ...) of completions, N / R to a row
AS_LONG_AS_ROWS = ("input_ids", "labels", "segment_ids")


def select_rows(experience: Experience, rows: Tensor, n: int) -> Experience:
    """What belongs to some of the n rows.

    >>> select_rows({"row": torch.tensor([5, 6]), "completion": torch.tensor([50, 51, 60, 61])}, torch.tensor([1]), 2)
    {'row': tensor([6]), 'completion': tensor([60, 61])}
    """
    return {name: x.unflatten(0, (n, -1))[rows].flatten(0, 1) for name, x in experience.items()}


def micro_batches(experience: Experience, size: int) -> Iterator[tuple[Tensor, Experience]]:
    """`size` rows at a time, of about the same length and without padding behind the longest, and which they are."""
    lengths = (experience["segment_ids"] > 0).sum(1)
    if size >= len(lengths):
        yield torch.arange(len(lengths), device=lengths.device), experience
        return
    for rows in lengths.argsort(stable=True).split(size):
        longest = int(lengths[rows].max())
        micro_batch = select_rows(experience, rows, len(lengths))
        yield rows, {name: x[:, :longest] if name in AS_LONG_AS_ROWS else x for name, x in micro_batch.items()}


def restore_order(rows: Sequence[Tensor], parts: Sequence[Experience]) -> Experience:
    """What was made of each pass, in the order of the rows that it was made of."""
    order = torch.cat(list(rows)).argsort()
    return select_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, order, len(order))


Reward = Callable[..., Sequence[float]]  # (prompts, completions, **columns) -> one number each


class Rollout(NamedTuple):
    """What was tokens: rows of a prompt and its completions, their tokens, where they stand, and which of them ended."""

    batch: Batch  # input_ids, labels, segment_ids (R, T); shared_prompt_len (R,) where rows hold several completions
    token_positions: Tensor  # (N, L) where in its row each token of a completion is predicted, 0 after its end
    mask: Tensor  # (N, L) which of the token_positions are tokens
    completions: list[list[int]]
    ended: Tensor  # (N,)


class Example(NamedTuple):
    """One completion as people read it."""

    prompt: str
    completion: str
    score: float
    kl: float  # distance to the reference, summed over its tokens


class ScoredRollout(NamedTuple):
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
def generate_rollout(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    config: GenerationConfig,
    *,
    copies: int = 1,
    share_prompts: bool = False,
    generator: torch.Generator,
    ends: Collection[int],
    pad: int,
) -> Rollout:
    """`copies` completions of each prompt, drawn by the policy in evaluation mode; each stops at its first end token.

    Those of a prompt are next to each other; with `share_prompts` they are in one row that holds the prompt once.
    """
    device = next(model.parameters()).device
    input_ids, segment_ids = left_pad([row.tolist() for row in prompts], pad, device=device)
    options = {"num_samples": copies, "eos_token_id": sorted(ends), "pad_token_id": pad}
    steps = decode(model, input_ids, config, segment_ids=segment_ids, generator=generator, **options)
    tokens = torch.stack(list(steps), dim=1).tolist()  # (N, L)
    completions = [_through_end(row, ends) for row in tokens]
    completion_ids = [np.asarray(row) for row in completions]
    if share_prompts:
        groups = [(prompt, completion_ids[i * copies :][:copies]) for i, prompt in enumerate(prompts)]
    else:
        groups = [(prompts[i // copies], [row]) for i, row in enumerate(completion_ids)]
    batch = groups_batch(groups, pad, share_prompts=share_prompts)
    token_positions, mask = _token_positions(batch["labels"], [len(row) for row in completion_ids])
    batch = {name: x.to(device) for name, x in batch.items()}
    ended = torch.tensor([row[-1] in ends for row in completions], device=device)
    return Rollout(batch, token_positions.to(device), mask.to(device), completions, ended)


def _through_end(row: list[int], ends: Collection[int]) -> list[int]:
    """The row as far as its first end token, which is part of it."""
    return row[: next((n for n, token in enumerate(row, start=1) if token in ends), len(row))]


def _token_positions(labels: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`token_positions` and `mask` (N, L) of completions that have all labels (R, T), in their order."""
    ends = torch.tensor(lengths)
    mask = torch.arange(int(ends.max())) < ends[:, None]
    token_positions = torch.zeros(mask.shape, dtype=torch.long)
    token_positions[mask] = (labels != IGNORED).nonzero()[:, 1]  # both go completion by completion
    return token_positions, mask


def gather_tokens(values: Tensor, token_positions: Tensor) -> Tensor:
    """What stands in rows (R, T) at the token_positions (N, L) of N / R completions to a row.

    >>> gather_tokens(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 2], [3, 0]])).tolist()
    [[6, 7], [8, 5]]
    """
    return values.gather(1, token_positions.reshape(len(values), -1)).view(token_positions.shape)
