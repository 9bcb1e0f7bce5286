"""The decoding loop: what has been read, the next token, and again."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.banned_tokens import build_rules
from genai_pl.generation.decode_state import Context, check_prompt
from genai_pl.generation.output_constraints import NO_LIMITS, Limits
from genai_pl.generation.processors import sample, token_logprobs
from genai_pl.models import Decoder, DecoderWithSource

WORTH_DROPPING = 8  # finished rows; to drop fewer costs a copy of the cache and saves little


@torch.no_grad()  # as a decorator it leaves the caller's mode alone between two steps
def decode(
    model: Decoder | DecoderWithSource,
    input_ids: Tensor,
    config: GenerationConfig,
    *,
    segment_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    finished: Tensor | None = None,
    num_samples: int = 1,
    limits: Limits = NO_LIMITS,
    logprobs: list[Tensor] | None = None,
) -> Generator[Tensor, None, None]:
    """The next tokens (B * num_samples,) of each step, until every row is finished or max_new_tokens are reached.

    Prompts (B, T) of unequal length are padded on the left, where segment_ids is 0; each is read once, and its samples
    are next to each other. `finished` (B * num_samples,) bool belongs to the caller: any eos sets a row of it, and so may the
    caller between two steps; a finished row yields pad_token_id, and is read no more once most are. `logprobs`, if given,
    gets the model's own log-probabilities of each step's tokens. The model is in evaluation mode until the iterator is
    exhausted or closed.
    """
    check_prompt(model, input_ids, segment_ids)
    B, T = input_ids.shape
    N, V = B * num_samples, model.config.vocab_size
    if finished is None:
        finished = torch.zeros(N, dtype=torch.bool, device=input_ids.device)
    segment = continued(segment_ids, num_samples)
    seen = seen_tokens(input_ids, segment_ids, config, V, num_samples)
    ends = torch.tensor(_listed(eos_token_id), dtype=torch.long, device=input_ids.device)
    rules = build_rules(config, limits.and_ends(ends.tolist()), input_ids, segment_ids, V)
    written: list[list[int]] = [[] for _ in range(N)]  # for the rules
    with evaluating(model):
        context = Context(model, B, T + config.max_new_tokens - 1)  # nobody reads the last token
        logits = context.read(input_ids, segment_ids).repeat_interleave(num_samples, dim=0)
        context.expand(num_samples)
        for n_left in reversed(range(config.max_new_tokens)):
            excluded = None if rules is None else rules.excluded(_going_on(written, finished), input_ids.device)
            token = sample(logits, config, generator, seen=seen, excluded=excluded).masked_fill_(finished, pad_token_id)
            if logprobs is not None:
                logprobs.append(token_logprobs(logits, token))
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if rules is not None:
                written = [[*row, new] for row, new in zip(written, token.tolist(), strict=True)]
            if len(ends):
                finished |= torch.isin(token, ends)
            yield token
            n_going = N - int(finished.sum())
            if n_left == 0 or n_going == 0:
                return
            if WORTH_DROPPING <= context.n_rows - n_going >= n_going:
                context.drop(finished)
            logits = context.read_on(logits, token, segment)


def generate(
    model: Decoder | DecoderWithSource,
    input_ids: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
    *,
    segment_ids: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    limits: Limits = NO_LIMITS,
) -> Tensor:
    """Prompts and continuations (B, T + n), n <= max_new_tokens: a row ends with any eos, pad_token_id fills up."""
    steps = decode(
        model,
        input_ids,
        config,
        segment_ids=segment_ids,
        generator=generator,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        limits=limits,
    )
    return torch.cat([input_ids, torch.stack(list(steps), dim=1)], dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards exactly those modules train that trained before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def continued(segment_ids: Tensor | None, n: int) -> Tensor | None:
    """The segment (B * n, 1) of what follows prompts (B, T) n times each: a continuation belongs to the last document."""
    return None if segment_ids is None else segment_ids[:, -1:].repeat_interleave(n, dim=0)


def seen_tokens(
    input_ids: Tensor, segment_ids: Tensor | None, config: GenerationConfig, vocab_size: int, n: int
) -> Tensor | None:
    """Which tokens (B * n, V) stand in each prompt, padding left out; None where nobody asks."""
    if config.repetition_penalty == 1:
        return None
    present = torch.ones_like(input_ids) if segment_ids is None else (segment_ids > 0).long()
    counts = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.long, device=input_ids.device)
    return (counts.scatter_add_(1, input_ids, present) > 0).repeat_interleave(n, dim=0)


def _listed(eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _going_on(written: list[list[int]], finished: Tensor) -> list[list[int] | None]:
    return [None if done else row for row, done in zip(written, finished.tolist(), strict=True)]
