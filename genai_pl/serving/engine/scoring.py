"""Vectors and scores of many texts, a slice at a time: after each `yield` others may have the model."""

from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from genai_pl.evaluation.embeddings import embed, judge
from genai_pl.evaluation.scoring import batches, score
from genai_pl.evaluation.windows import ScoredWindow
from genai_pl.models import Model
from genai_pl.models.sentence import SentenceHead
from genai_pl.serving.engine.model_runner import unbatchable_reason

CPU_TOKENS, GPU_TOKENS = 256, 8192  # of a slice, padding included: well below a second
Rows = Sequence[Sequence[int]]


def slice_tokens(model: Model) -> int:
    """How many tokens are read at a time."""
    return CPU_TOKENS if next(model.parameters()).device.type == "cpu" else GPU_TOKENS


def embedding_slices(model: Model, rows: Rows, head: SentenceHead) -> Generator[None, None, Tensor]:
    """Vectors (N, D) of rows of tokens, float32 on the CPU."""
    vectors = torch.empty(len(rows), head.size)
    for batch, is_long in _plan_slices(model, [len(row) for row in rows]):
        if is_long:
            hidden = yield from _sliced_features(model, rows[batch[0]])
            ones = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            vectors[batch] = head.to(hidden.float())(hidden.float(), ones).detach().cpu()
        else:
            vectors[batch] = embed(model, [rows[n] for n in batch], head)
            yield
    return vectors


def reward_slices(model: Model, rows: Rows) -> Generator[None, None, Tensor]:
    """A reward model's score of each row, (N,) float64 on the CPU."""
    rewards = torch.zeros(len(rows), dtype=torch.float64)
    for batch in batches([len(row) for row in rows], slice_tokens(model)):
        rewards[batch] = judge(model, [rows[n] for n in batch])
        yield
    return rewards


def logprob_slices(
    model: Model, rows: Sequence[ScoredWindow], owners: Sequence[int], n_texts: int
) -> Generator[None, None, list[tuple[float, int]]]:
    """The log-probability in nats of each text, the sum over the rows that it owns; and of how many tokens."""
    totals, counts = np.zeros(n_texts), np.zeros(n_texts, dtype=int)
    for batch, is_long in _plan_slices(model, [len(row.tokens) - 1 for row in rows]):
        if is_long:
            nll = [(yield from _sliced_nll(model, rows[batch[0]]))]
        else:
            nll = score(model, [rows[n] for n in batch], batch_tokens=slice_tokens(model)).nll.tolist()
            yield
        for n, value in zip(batch, nll, strict=True):
            totals[owners[n]] -= value
            counts[owners[n]] += rows[n].n_scored
    return list(zip(totals.tolist(), counts.tolist(), strict=True))


def _plan_slices(model: Model, lengths: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
    """Rows that are read in one slice, and whether it is one row that is read in several, out of a cache."""
    size, can_slice = slice_tokens(model), unbatchable_reason(model) is None
    for batch in batches(lengths, size):
        yield batch, can_slice and lengths[batch[0]] > size


def _cached_slices(
    model: Model, tokens: Sequence[int], on_chunk: Callable[[int, Tensor], None]
) -> Generator[None, None, None]:
    """Read the tokens; `take` is given where each part begins and its hidden states (1, T, C)."""
    size, device = slice_tokens(model), next(model.parameters()).device
    with torch.inference_mode():
        cache = model.new_cache(1, len(tokens))
    for start in range(0, len(tokens), size):
        with torch.inference_mode():
            chunk = torch.tensor([tokens[start : start + size]], device=device)
            on_chunk(start, model.features(chunk, cache=cache))
        yield


def _sliced_features(model: Model, row: Sequence[int]) -> Generator[None, None, Tensor]:
    """The hidden states (1, T, C) of a long row."""
    parts: list[Tensor] = []
    yield from _cached_slices(model, list(row), lambda start, hidden: parts.append(hidden))
    with torch.inference_mode():
        return torch.cat(parts, dim=1)


def _sliced_nll(model: Model, row: ScoredWindow) -> Generator[None, None, float]:
    """The negative log-likelihood of what is scored of a long row, in nats."""
    tokens, nll = torch.from_numpy(row.tokens).long(), []

    def add_nll(start: int, hidden: Tensor) -> None:
        first = max(start, row.n_context - 1)  # the position that predicts the first scored token
        targets = tokens[first + 1 : start + hidden.shape[1] + 1].to(hidden.device)
        if len(targets) > 0:
            logprobs = model.logits(hidden[0, first - start :]).float().log_softmax(-1)
            nll.append(-logprobs.gather(1, targets[:, None]).double().sum().item())

    yield from _cached_slices(model, tokens[:-1].tolist(), add_nll)
    return sum(nll)
