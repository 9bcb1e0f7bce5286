"""Scoring: the log-likelihood of the scored part of each window, and which of its tokens greedy decoding would give.

Windows of similar length share a batch, longest first. Logits exist for a chunk of tokens at a time and only at scored
positions: at a vocabulary of 150,000, those of a batch would take gigabytes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.evaluation.windows import ScoredWindow
from genai_pl.kernels.chunked_logits import tokens_at_once
from genai_pl.models import Decoder

IGNORED = -100


class Scores(NamedTuple):
    """Scores of R windows with N scored tokens in all, on the CPU.

    nll: (R,) negative log-likelihood in nats, float64. hits: (R,) scored tokens that are the most likely ones.
    confidence: (N,) the probability of the most likely token, float32. correct: (N,) whether it is the token that follows.
    The order of the N tokens is that of batches.
    """

    nll: Tensor
    hits: Tensor
    confidence: Tensor
    correct: Tensor


@torch.inference_mode()
def score(
    model: Decoder, rows: Sequence[ScoredWindow], *, batch_tokens: int, on_batch: Callable[[int], object] | None = None
) -> Scores:
    """The scores of the windows in their order.

    batch_tokens: tokens of a batch, padding included. on_batch: called with the number of windows after every batch.
    """
    _check_vocab_size(model, rows)
    nll = torch.zeros(len(rows), dtype=torch.float64)
    hits = torch.zeros(len(rows), dtype=torch.long)
    confidence, correct = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for batch in batches([len(row.tokens) - 1 for row in rows], batch_tokens):
        scores = _score_batch(model, [rows[i] for i in batch])
        nll[batch], hits[batch] = scores.nll, scores.hits
        confidence.append(scores.confidence)
        correct.append(scores.correct)
        if on_batch is not None:
            on_batch(len(batch))
    return Scores(nll, hits, torch.cat(confidence), torch.cat(correct))


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches of at most batch_tokens, padding included; longest first, so memory runs out at once or never.

    >>> list(batches([2, 9, 3], 9))
    [[1], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    first = 0
    while first < len(order):
        size = max(1, batch_tokens // lengths[order[first]])
        yield order[first : first + size]
        first += size


def collate(rows: Sequence[ScoredWindow], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """input_ids, labels and segment_ids (B, T), padded on the right.

    Labels are IGNORED where nothing is scored; segment_ids is None where nothing is padded, which saves the mask.
    """
    lengths = [len(row.tokens) - 1 for row in rows]
    B, T = len(rows), max(lengths)
    input_ids = torch.zeros(B, T, dtype=torch.long)
    labels = torch.full((B, T), IGNORED)
    for b, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        # position t holds token t and predicts token t + 1
        tokens = torch.from_numpy(row.tokens).long()
        input_ids[b, :length] = tokens[:-1]
        labels[b, row.n_context - 1 : length] = tokens[row.n_context :]
    padded = min(lengths) < T
    segments = (torch.arange(T) < torch.tensor(lengths)[:, None]).long().to(device) if padded else None
    return input_ids.to(device), labels.to(device), segments


def _score_batch(model: Decoder, rows: Sequence[ScoredWindow]) -> Scores:
    """The scores of windows (B,) that are one batch."""
    input_ids, labels, segment_ids = collate(rows, model.embed.weight.device)
    hidden = model.features(input_ids, segment_ids)  # (B, T, C)
    scored = labels != IGNORED
    losses, confidence, correct = _score_tokens(model, hidden[scored], labels[scored])  # (N,)
    # back to (B, T), where each window sums its own tokens
    nll = torch.zeros(labels.shape, dtype=torch.float64)
    hits = torch.zeros(labels.shape, dtype=torch.long)
    nll[scored.cpu()], hits[scored.cpu()] = losses.double(), correct.long()
    return Scores(nll.sum(1), hits.sum(1), confidence, correct)


def _score_tokens(model: Decoder, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihood, confidence and correctness, (N,) each, of hidden states (N, C) with labels (N,).

    One matrix product per chunk gives all three; `linear_logprobs` would need a second one for the most likely token.
    """
    size = tokens_at_once(model.config.vocab_size, hidden.device)
    nll, confidence, correct = [], [], []
    for part, goal in zip(hidden.split(size), labels.split(size), strict=True):
        logits = model.logits(part).float()  # (n, V); bf16 keeps 8 bits: too few for the tail of a wide softmax
        logprobs, best = logits.log_softmax(-1), logits.argmax(-1)
        nll.append(-logprobs.gather(1, goal[:, None])[:, 0])
        confidence.append(logprobs.gather(1, best[:, None])[:, 0].exp())
        correct.append(best == goal)
    return torch.cat(nll).cpu(), torch.cat(confidence).cpu(), torch.cat(correct).cpu()


def _check_vocab_size(model: Decoder, rows: Sequence[ScoredWindow]) -> None:
    """ConfigError where a token id exceeds the model's vocabulary: model and tokenizer are not of one another."""
    largest, size = max((int(row.tokens.max()) for row in rows), default=0), model.config.vocab_size
    if largest >= size:
        raise ConfigError(f"the tokenizer gives token {largest}, the model knows {size}: they do not belong together")
