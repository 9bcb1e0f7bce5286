"""Rollouts: completions that a policy generates in training, as the batches that it learns from.

Two layouts of the same completions meet here. Rows (R, T) go through the model: a prompt with one completion, or, with
shared prompts, with all `group_size` completions after it as segments of their own. Completions (N, L) go through the
objective: one line per completion, tokens from the left. N is a multiple of R, and completions i * N/R to (i + 1) *
N/R - 1 belong to row i. `token_positions` (N, L) leads from the second to the first: `gather_tokens(row_values,
token_positions)`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.distributed.dtensor import is_dtensor
from genai_pl.generation.decode import decode
from genai_pl.generation.prefix_cache import PrefixCache
from genai_pl.generation.text import left_pad
from genai_pl.models.packed_linear import packed_products
from genai_pl.modules.base import Batch
from genai_pl.objectives import IGNORED
from genai_pl.objectives.preference_collators import groups_batch

Experience = dict[str, Tensor]  # by name, (R, ...) per row or (N, ...) per completion, N / R completions to a row
AS_LONG_AS_ROWS = ("input_ids", "labels", "segment_ids")  # (R, T): cut to the longest row of a micro-batch


def select_rows(experience: Experience, rows: Tensor, n: int) -> Experience:
    """The part of an experience that belongs to some of its n rows, with all completions of each.

    >>> select_rows({"row": torch.tensor([5, 6]), "completion": torch.tensor([50, 51, 60, 61])}, torch.tensor([1]), 2)
    {'row': tensor([6]), 'completion': tensor([60, 61])}
    """
    return {name: x.unflatten(0, (n, -1))[rows].flatten(0, 1) for name, x in experience.items()}


def micro_batches(experience: Experience, size: int) -> Iterator[tuple[Tensor, Experience]]:
    """Pairs of row indices and those rows, `size` at a time, for a forward pass each.

    Rows are sorted by length, and each micro-batch is cut to its longest row: less padding than in the order of the
    rollout. `restore_order` undoes the sorting. Memory depends on `size`, results do not.
    """
    lengths = (experience["segment_ids"] > 0).sum(1)
    if size >= len(lengths):
        yield torch.arange(len(lengths), device=lengths.device), experience
        return
    for rows in lengths.argsort(stable=True).split(size):
        longest = int(lengths[rows].max())
        micro_batch = select_rows(experience, rows, len(lengths))
        yield rows, {name: x[:, :longest] if name in AS_LONG_AS_ROWS else x for name, x in micro_batch.items()}


def restore_order(rows: Sequence[Tensor], parts: Sequence[Experience]) -> Experience:
    """The outputs of micro-batches as one experience, in the order of the rows that they were made of."""
    order = torch.cat(list(rows)).argsort()
    return select_rows({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, order, len(order))


Reward = Callable[..., Sequence[float]]  # (prompts, completions, **columns) -> one number each


class Rollout(NamedTuple):
    """Completions of a batch of prompts.

    batch: rows for the model: input_ids, labels and segment_ids (R, T), and `shared_prompt_len` (R,), the tokens of the
        prompt that all completions of a row share, where rows hold several
    token_positions: (N, L), the position in its row at which each token of a completion is predicted; 0 after its end
    mask: (N, L), True for tokens of completions, their end token included
    completions: the tokens of each, up to its first end token, which is included; of an episode all after the prompt
    ended: (N,), whether a completion has an end token; the others were cut off at max_new_tokens
    turn_rewards: (N, L), the reward of each turn of an episode, or of each step, at its last token; None where there is none
    metrics: (N,) numbers of episodes, by name
    step_ends: (N, L), where steps end that a process reward model has scored; turn_rewards are theirs. None without one
    """

    batch: Batch
    token_positions: Tensor
    mask: Tensor
    completions: list[list[int]]
    ended: Tensor
    turn_rewards: Tensor | None = None
    metrics: dict[str, Tensor] = {}
    step_ends: Tensor | None = None


class Example(NamedTuple):
    """One scored completion, to be shown to people.

    prompt, completion: texts without special tokens
    score: the reward, penalties included; nan where no reward applies
    kl: log-probability under the policy minus that under the reference, summed over the completion's tokens, in nats
    """

    prompt: str
    completion: str
    score: float
    kl: float


class ScoredRollout(NamedTuple):
    """A rollout with its texts and scores.

    rollout: tokens, positions and mask
    prompts, completions: N texts each, as the reward function received them
    scores: (N,) rewards minus penalties, float32; nan where no reward applies
    """

    rollout: Rollout
    prompts: list[str]
    completions: list[str]
    scores: Tensor

    def examples(self, kl: Tensor, n: int) -> list[Example]:
        """The first n completions with scores and KL; kl is (N,)."""
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
    """`copies` completions of each prompt, sampled from the policy in evaluation mode; each stops at its first end token.

    prompts: token ids of each prompt
    config: how to sample (max_new_tokens, temperature)
    share_prompts: one row per prompt holds it once, with all its completions; else one row per completion
    ends: end tokens of the model and its tokenizer
    pad: token that fills rows

    Completions of a prompt are neighbours: completion j of prompt i is number i * copies + j.
    """
    options = {"copies": copies, "generator": generator, "ends": ends, "pad": pad}
    completions = sample_completions(model, [row.tolist() for row in prompts], config, **options)
    device = next(model.parameters()).device
    batch, token_positions, mask = training_rows(
        [prompts[i // copies] for i in range(len(completions))],
        [(row, [True] * len(row)) for row in completions],
        copies=copies if share_prompts else 1,
        pad=pad,
        device=device,
    )
    ended = torch.tensor([row[-1] in ends for row in completions], device=device)
    return Rollout(batch, token_positions, mask, completions, ended)


@torch.no_grad()
def sample_completions(
    model: nn.Module,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    copies: int = 1,
    generator: torch.Generator,
    ends: Collection[int],
    pad: int,
    prefix_cache: PrefixCache | None = None,
) -> list[list[int]]:
    """`copies` completions of each prompt, neighbours, sampled from the policy in evaluation mode up to their first end token.

    The arguments are those of `generate_rollout`; prefix_cache: as of `decode`.
    """
    # prompts are padded on the left, so that all continue in the same column
    input_ids, segment_ids = left_pad(prompts, pad, device=next(model.parameters()).device)
    options = {"num_samples": copies, "eos_token_id": sorted(ends), "pad_token_id": pad, "prefix_cache": prefix_cache}
    with _rounded_once(model):
        steps = decode(model, input_ids, config, segment_ids=segment_ids, generator=generator, **options)
        tokens = torch.stack(list(steps), dim=1).tolist()  # (N, L)
    return [_through_end(row, ends) for row in tokens]


def training_rows(
    prompts: Sequence[np.ndarray],
    continuations: Sequence[tuple[Sequence[int], Sequence[bool]]],
    *,
    copies: int,
    pad: int,
    device: torch.device,
) -> tuple[Batch, Tensor, Tensor]:
    """(batch, token_positions, mask) of a `Rollout`, whose rows are padded on the right.

    prompts: one for each continuation. continuations: tokens, and which of them were sampled; only these have labels, and
    places in token_positions and mask. copies: continuations of one prompt that share a row; 1: each has its own.
    """
    ids = [np.asarray(tokens) for tokens, _ in continuations]
    groups = [(prompts[i], ids[i : i + copies]) for i in range(0, len(ids), copies)]
    batch = groups_batch(groups, pad, share_prompts=copies > 1)
    # labels of tokens that were not sampled are removed; both sides are in the order of continuations
    labels = batch["labels"]
    is_sampled = torch.tensor([flag for _, flags in continuations for flag in flags])
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    labels[rows[~is_sampled], columns[~is_sampled]] = IGNORED
    token_positions, mask = _token_positions(labels, [sum(flags) for _, flags in continuations])
    return {name: x.to(device) for name, x in batch.items()}, token_positions.to(device), mask.to(device)


@contextmanager
def _rounded_once(model: nn.Module) -> Iterator[None]:
    """A context without gradients in which autocast rounds each weight once, instead of for every token.

    Copies are forgotten afterwards: one that was made without gradients must not serve a pass that needs them.
    """
    kind = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    is_packable = kind == "cpu" and not any(is_dtensor(weight) for weight in model.parameters())
    try:
        with (
            packed_products(model) if is_packable else nullcontext(),
            torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=True),
        ):
            yield
    finally:
        torch.clear_autocast_cache()


def _through_end(row: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to and including the first end token."""
    return row[: next((n for n, token in enumerate(row, start=1) if token in ends), len(row))]


def _token_positions(labels: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`token_positions` and `mask` (N, L) of completions of the given lengths.

    Rows (R, T) have labels at completion tokens only, so the n-th label in row order is the n-th token in completion
    order.
    """
    ends = torch.tensor(lengths)
    mask = torch.arange(int(ends.max())) < ends[:, None]
    token_positions = torch.zeros(mask.shape, dtype=torch.long)
    token_positions[mask] = (labels != IGNORED).nonzero()[:, 1]  # both sides are in the order of completions
    return token_positions, mask


def gather_tokens(values: Tensor, token_positions: Tensor) -> Tensor:
    """Values of completion tokens (N, L) from values of rows (R, T), at token_positions (N, L).

    >>> gather_tokens(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 2], [3, 0]])).tolist()
    [[6, 7], [8, 5]]
    """
    return values.gather(1, token_positions.reshape(len(values), -1)).view(token_positions.shape)
