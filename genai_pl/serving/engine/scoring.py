"""Embeddings, rewards and log-probabilities of many texts, as generators of slices.

Each `yield` ends a slice of at most CPU_TOKENS or GPU_TOKENS tokens, and the caller may let other requests use the model
before it resumes the generator; the generator's return value is the result. A batch of short texts is one slice. A text longer
than a slice is read chunk by chunk into a KV cache, where the model allows it, so that no single text holds the model.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from genai_pl.evaluation.embeddings import embed, reward_scores
from genai_pl.evaluation.labels import label_logits
from genai_pl.evaluation.scoring import batches, score
from genai_pl.evaluation.windows import ScoredWindow
from genai_pl.models import Model
from genai_pl.models.sentence import SentenceHead
from genai_pl.serving.engine.model_runner import unbatchable_reason

CPU_TOKENS, GPU_TOKENS = (
    256,
    8192,
)  # of a slice, padding included: well below a second
Rows = Sequence[Sequence[int]]


def slice_tokens(model: Model) -> int:
    """Tokens of one slice on the model's device."""
    return CPU_TOKENS if next(model.parameters()).device.type == "cpu" else GPU_TOKENS


def embedding_slices(model: Model, rows: Rows, head: SentenceHead) -> Generator[None, None, Tensor]:
    """Sentence embeddings (N, head.size), float32 on the CPU, of N rows of token ids.

    head: pooling, and the dense layers and normalization of a sentence-transformers folder
    """
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
    """Rewards (N,), float64 on the CPU, of N rows of token ids; the model has a scalar score head.

    A row is never cut: the score is read at its last token.
    """
    rewards = torch.zeros(len(rows), dtype=torch.float64)
    for batch in batches([len(row) for row in rows], slice_tokens(model)):
        rewards[batch] = reward_scores(model, [rows[n] for n in batch])
        yield
    return rewards


def label_slices(model: Model, rows: Mapping[str, Rows]) -> Generator[None, None, Tensor]:
    """Outputs (N, K), float32 on the CPU, of a head for labels for N rows of `input_ids` and perhaps `token_type_ids`."""
    logits = torch.zeros(len(rows["input_ids"]), model.config.n_labels)
    for batch in batches([len(row) for row in rows["input_ids"]], slice_tokens(model)):
        logits[batch] = label_logits(model, {name: [column[n] for n in batch] for name, column in rows.items()})
        yield
    return logits


def logprob_slices(
    model: Model, rows: Sequence[ScoredWindow], owners: Sequence[int], n_texts: int
) -> Generator[None, None, list[tuple[float, int]]]:
    """(log-probability in nats, scored tokens) of each of `n_texts` texts.

    rows: windows of the texts, each scoring the tokens that no earlier window scored
    owners: index of the text that each window belongs to; a text's value is the sum over its windows
    """
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


PromptLogprobs = list[tuple[float | None, tuple[tuple[int, float], ...]]]


def prompt_logprob_slices(model: Model, rows: Rows, n: int) -> Generator[None, None, list[PromptLogprobs]]:
    """For each token of each row its log-probability in nats, and the n likeliest tokens in its place with theirs.

    The first token of a row follows nothing: (None, ()).
    """
    can_slice, found = unbatchable_reason(model) is None, []
    device = next(model.parameters()).device
    for row in rows:
        values: PromptLogprobs = [(None, ())]

        def add(start: int, hidden: Tensor, row: Sequence[int] = row, values: PromptLogprobs = values) -> None:
            logprobs = model.logits(hidden[0]).float().log_softmax(-1)  # (T, V) of the slice
            targets = torch.tensor(row[start + 1 : start + 1 + len(logprobs)], device=logprobs.device)
            chosen = logprobs.gather(1, targets[:, None])[:, 0].tolist()
            best = logprobs.topk(min(n, logprobs.shape[1]))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            values.extend((value, tuple(zip(*pair, strict=True))) for value, pair in zip(chosen, pairs, strict=True))

        if can_slice and len(row) > 2:
            yield from _cached_slices(model, row[:-1], add)
        elif len(row) > 1:
            with torch.inference_mode():
                add(0, model.features(torch.tensor([row[:-1]], device=device)))
            yield
        found.append(values)
    return found


def _plan_slices(model: Model, lengths: Sequence[int]) -> Iterator[tuple[list[int], bool]]:
    """Batches of row indices, and whether the batch is one long row that is read in several slices.

    Rows of about the same length share a batch. Reading in slices needs what batched decoding needs, a cache whose columns
    mean the same to every token; other models read a long row in one slice.
    """
    size, can_slice = slice_tokens(model), unbatchable_reason(model) is None
    for batch in batches(lengths, size):
        yield batch, can_slice and lengths[batch[0]] > size


def _cached_slices(
    model: Model, tokens: Sequence[int], on_chunk: Callable[[int, Tensor], None]
) -> Generator[None, None, None]:
    """Read a row of tokens chunk by chunk; `on_chunk` gets each chunk's first position and hidden states (1, T, C)."""
    size, device = slice_tokens(model), next(model.parameters()).device
    with torch.inference_mode():
        cache = model.new_cache(1, len(tokens))
    for start in range(0, len(tokens), size):
        with torch.inference_mode():
            chunk = torch.tensor([tokens[start : start + size]], device=device)
            on_chunk(start, model.features(chunk, cache=cache))
        yield


def _sliced_features(model: Model, row: Sequence[int]) -> Generator[None, None, Tensor]:
    """Hidden states (1, T, C) of a long row, read in slices."""
    parts: list[Tensor] = []
    yield from _cached_slices(model, list(row), lambda start, hidden: parts.append(hidden))
    with torch.inference_mode():
        return torch.cat(parts, dim=1)


def _sliced_nll(model: Model, row: ScoredWindow) -> Generator[None, None, float]:
    """Negative log-likelihood in nats of the scored tokens of a long window, read in slices.

    Only the chunk's logits exist at a time: (T, V) of the whole window may be gigabytes.
    """
    tokens, nll = torch.from_numpy(row.tokens).long(), []

    def add_nll(start: int, hidden: Tensor) -> None:
        first = max(start, row.n_context - 1)  # the position that predicts the first scored token
        targets = tokens[first + 1 : start + hidden.shape[1] + 1].to(hidden.device)
        if len(targets) > 0:
            logprobs = model.logits(hidden[0, first - start :]).float().log_softmax(-1)
            nll.append(-logprobs.gather(1, targets[:, None]).double().sum().item())

    yield from _cached_slices(model, tokens[:-1].tolist(), add_nll)
    return sum(nll)
