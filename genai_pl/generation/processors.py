"""Logits processors: pure functions from logits (B, V) to the logits that are sampled from, in transformers' order.

The order is: logit bias; repetition, presence and frequency penalty; banned tokens (prefix, no-repeat n-grams, bad words,
min_new_tokens, grammar: `banned_tokens.py`), which commute with each other; then, for sampling, temperature, top-k, top-p,
min-p. Beam search applies the first three to log-probabilities, as transformers does. The order matters: top-p after
temperature keeps another set of tokens than before it.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.config.generation import GenerationConfig

FILTERED_LOGIT = -float("inf")
WIDE = 8192  # tokens above which a draw on a CPU does without a random number for each
BLOCK = 256  # of them that one of its two numbers chooses from


def logit_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Logits (..., V) plus a number for some token ids; ids outside the vocabulary are ignored."""
    known = {token: value for token, value in bias.items() if token < logits.shape[-1]}
    added = torch.zeros(logits.shape[-1], device=logits.device)
    added[list(known)] = torch.tensor(list(known.values()), device=logits.device)
    return logits + added


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of tokens in `seen` (B, V) divided by the penalty, or multiplied if negative (Keskar et al. 2019, section 4.1).

    >>> repetition_penalty(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]]), 2.0).tolist()
    [[1.0, -4.0, 1.0]]
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def count_penalty(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Logits less `presence` for tokens with a count (B, V) above 0, and `frequency` times the count (OpenAI's API reference).

    >>> count_penalty(torch.zeros(1, 3), torch.tensor([[0, 1, 2]]), 1.0, 0.5).tolist()
    [[0.0, -1.5, -2.0]]
    """
    return logits - presence * (counts > 0) - frequency * counts


def temperature(logits: Tensor, value: float) -> Tensor:
    """Logits divided by the temperature: below 1 sharpens the distribution, above 1 flattens it (Ackley et al. 1985)."""
    return logits / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Logits of the k likeliest tokens and of those that tie with the k-th (Fan et al. 2018).

    >>> top_k(torch.tensor([1.0, 3.0, 2.0]), 2).tolist()
    [-inf, 3.0, 2.0]
    """
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, FILTERED_LOGIT)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Logits of the smallest set of tokens that holds at least probability p (Holtzman et al. 2020, eq. 2).

    >>> top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6).isfinite().tolist()
    [True, True, False]
    """
    # in ascending order, the tokens whose cumulative probability is at most 1 - p are removed; one always stays
    ascending, order = logits.sort()
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), FILTERED_LOGIT)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Logits of the tokens at least p times as likely as the likeliest (Nguyen et al. 2024, eq. 2).

    >>> min_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.5).isfinite().tolist()
    [True, True, False]
    """
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), FILTERED_LOGIT)


def penalize(
    logits: Tensor,
    config: GenerationConfig,
    *,
    seen: Tensor | None = None,
    banned: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Logits or log-probabilities (B, V) after bias, penalties and mask, before any temperature, in float32.

    seen: (B, V) bool, tokens of prompt and text for the repetition penalty. counts: (B, V), how often each token was generated,
    for the other two. banned: (B, V) bool, tokens that must not come; their logits become -inf.
    """
    logits = logits.float()  # bf16 keeps 8 bits: too few for the tail of a 50k-way softmax
    if config.logit_bias:
        logits = logit_bias(logits, config.logit_bias)
    if seen is not None:
        logits = repetition_penalty(logits, seen, config.repetition_penalty)
    if counts is not None:
        logits = count_penalty(logits, counts, config.presence_penalty, config.frequency_penalty)
    return logits if banned is None else logits.masked_fill(banned, FILTERED_LOGIT)


def process(
    logits: Tensor,
    config: GenerationConfig,
    *,
    seen: Tensor | None = None,
    banned: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Logits (B, V) whose softmax is sampled from, in float32; `seen`, `banned` and `counts` as for `penalize`."""
    logits = penalize(logits, config, seen=seen, banned=banned, counts=counts)
    if config.temperature not in (0.0, 1.0):
        logits = temperature(logits, config.temperature)
    if config.top_k is not None:
        logits = top_k(logits, config.top_k)
    if config.top_p is not None and config.top_p < 1:
        logits = top_p(logits, config.top_p)
    if config.min_p is not None:
        logits = min_p(logits, config.min_p)
    return logits


def sample(
    logits: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
    *,
    seen: Tensor | None = None,
    banned: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The next tokens (B,): draws from the softmax of the processed logits, or their argmax where temperature is 0.

    One generator draws for all rows: the tokens of a row depend on the batch it is in. Serving draws each row from its own.
    """
    logits = process(logits, config, seen=seen, banned=banned, counts=counts)
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    return draw_token(logits.softmax(dim=-1), generator)


def draw_token(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index (B,) for each row of probabilities (B, V), which need not add up to 1.

    `torch.multinomial` draws a number for each of the V: a millisecond for 50,000 on a CPU, and a row of a batch after the
    other. There one number chooses a block of indices, and another one an index in it: each the first whose cumulative
    probability exceeds it. RuntimeError for NaN.

    Two batches round otherwise, which moves every one of the V borders between cumulative probabilities. One number for all
    of them would meet a border that moved in about one of 200 draws from a flat distribution over 50,000 tokens; few borders
    for each number keep what a seed draws the same whatever else is in the batch.
    """
    if probabilities.device.type != "cpu" or probabilities.shape[-1] <= WIDE:
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    numbers = torch.rand(len(probabilities), 2, 1, generator=generator, dtype=torch.float64)
    return torch.cat([_draw_by_block(row, *pair) for row, pair in zip(probabilities, numbers, strict=True)])


def _draw_by_block(probabilities: Tensor, number: Tensor, number_within: Tensor) -> Tensor:
    """An index (1,) of probabilities (V,), by two numbers (1,) of 0 to 1."""
    blocks = F.pad(probabilities, (0, -len(probabilities) % BLOCK)).view(-1, BLOCK)
    block = _first_above(blocks.sum(1, dtype=torch.float64), number)
    return block * BLOCK + _first_above(blocks[int(block)], number_within)


def _first_above(probabilities: Tensor, number: Tensor) -> Tensor:
    """The first index (1,) whose cumulative probability exceeds a number (1,) of 0 to 1 times the total of all (V,)."""
    cumulative = probabilities.cumsum(0, dtype=torch.float64)
    total = cumulative[-1:]
    if not total > 0:
        raise RuntimeError("probabilities are NaN, or all of them 0")
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding may reach the total itself
    return torch.searchsorted(cumulative, torch.minimum(number * total, below), right=True)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """The model's own log-probability (B,) of each token (B,), before any processing: log-softmax in float32."""
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
