"""Decoding loop: prefill the prompts once, then sample one token per row and step until every row is finished.

Rollouts, samples during training, generate.py and the Python API all use this loop. Serving has its own engine, because there
requests come and go between steps; it shares `sample` and `BannedTokens` with this one.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.banned_tokens import build_banned_tokens
from genai_pl.generation.captured_step import CapturedSteps
from genai_pl.generation.decode_state import DecodeState, check_prompt
from genai_pl.generation.output_constraints import NO_CONSTRAINTS, OutputConstraints
from genai_pl.generation.prefix_cache import PrefixCache
from genai_pl.generation.processors import sample, token_logprobs
from genai_pl.models import Decoder, DecoderWithSource
from genai_pl.peft.adapter import RowWeights

WORTH_DROPPING = 8  # finished rows; dropping fewer costs a copy of the cache and saves little


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
    constraints: OutputConstraints = NO_CONSTRAINTS,
    logprobs: list[Tensor] | None = None,
    row_weights: RowWeights | None = None,
    prefix_cache: PrefixCache | None = None,
) -> Generator[Tensor, None, None]:
    """Yields the next tokens (N,) of each step, N = B * num_samples, until all rows are finished or max_new_tokens are reached.

    input_ids: prompts (B, T); shorter ones are padded on the left, where segment_ids (B, T) is 0. Each prompt is prefilled once,
        and its samples are rows next to each other.
    eos_token_id: ids that finish a row once sampled. pad_token_id: the token that a finished row yields.
    finished: (N,) bool, updated in place and shared with the caller, who may set rows of it between two steps.
    logprobs: a list that receives (N,) per step: log-probabilities of the tokens under the model's own distribution, before
        temperature, penalties and masks.
    row_weights: weights of adapters for each prompt, (B,), which its samples share.
    prefix_cache: what the last batch has read and written, which the prompts continue; it keeps the same of this one.

    The model is in evaluation mode until the generator is exhausted or closed, then every module returns to its former mode.
    Finished rows leave the batch once they are at least half of it and at least 8.
    """
    # masks, counts and rules are prepared per row, before the model runs
    check_prompt(model, input_ids, segment_ids)
    B, T = input_ids.shape
    N, V = B * num_samples, model.config.vocab_size
    if finished is None:
        finished = torch.zeros(N, dtype=torch.bool, device=input_ids.device)
    segment = continuation_segments(segment_ids, num_samples)
    seen = seen_tokens(input_ids, segment_ids, config, V, num_samples)
    counts = torch.zeros(N, V, device=input_ids.device) if config.counts_tokens else None
    ends = torch.tensor(_as_list(eos_token_id), dtype=torch.long, device=input_ids.device)
    banned_tokens = build_banned_tokens(config, constraints.and_ends(ends.tolist()), input_ids, segment_ids, V)
    generated: list[list[int]] = [[] for _ in range(N)]  # by row, for `banned_tokens` alone
    with evaluating(model):
        # prefill: one forward pass over the prompts, whose last logits serve all samples
        steps = CapturedSteps() if config.cuda_graphs and input_ids.device.type == "cuda" else None
        n_tokens = T + config.max_new_tokens - 1  # the last token is never an input
        state = DecodeState(model, B, n_tokens, row_weights, steps)
        read = state.forward if prefix_cache is None else partial(prefix_cache.prefill, state)
        logits = read(input_ids, segment_ids).repeat_interleave(num_samples, dim=0)
        state.expand(num_samples)
        # decode: sample from the logits of the last step, record the tokens, run the model on them
        for n_left in reversed(range(config.max_new_tokens)):
            banned = None
            if banned_tokens is not None:
                banned = banned_tokens.mask(_unfinished(generated, finished), input_ids.device)
            token = sample(logits, config, generator, seen=seen, banned=banned, counts=counts)
            token.masked_fill_(finished, pad_token_id)
            if logprobs is not None:
                logprobs.append(token_logprobs(logits, token))
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if counts is not None:
                counts.scatter_add_(1, token[:, None], torch.ones_like(counts[:, :1]))
            if banned_tokens is not None:
                generated = [[*row, new] for row, new in zip(generated, token.tolist(), strict=True)]
            if len(ends):
                finished |= torch.isin(token, ends)
            yield token
            # the caller may have finished rows while this generator was suspended in `yield`
            n_unfinished = N - int(finished.sum())
            if n_left == 0 or n_unfinished == 0:
                if prefix_cache is not None:
                    prefix_cache.keep(state, _rows_of(state), N)
                return
            if WORTH_DROPPING <= state.n_rows - n_unfinished >= n_unfinished:
                if prefix_cache is not None:
                    rows = _rows_of(state)
                    prefix_cache.keep(state, rows[finished[rows]], N)
                state.drop_finished(finished)
            logits = state.step(logits, token, segment)


def generate(
    model: Decoder | DecoderWithSource,
    input_ids: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
    *,
    segment_ids: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    constraints: OutputConstraints = NO_CONSTRAINTS,
) -> Tensor:
    """Prompts and continuations (B, T + n), n <= max_new_tokens; after an end token a row is filled with pad_token_id.

    The arguments are those of `decode`.
    """
    steps = decode(
        model,
        input_ids,
        config,
        segment_ids=segment_ids,
        generator=generator,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        constraints=constraints,
    )
    return torch.cat([input_ids, torch.stack(list(steps), dim=1)], dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: evaluation mode inside, and afterwards training mode for exactly the modules that had it.

    `model.train()` would not do: it also switches modules that their owner keeps in evaluation mode, a frozen base for example.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def continuation_segments(segment_ids: Tensor | None, n: int) -> Tensor | None:
    """Segment ids (B * n, 1) of new tokens after prompts (B, T) with n samples each: those of the prompt's last document."""
    return None if segment_ids is None else segment_ids[:, -1:].repeat_interleave(n, dim=0)


def seen_tokens(
    input_ids: Tensor, segment_ids: Tensor | None, config: GenerationConfig, vocab_size: int, n: int
) -> Tensor | None:
    """Mask (B * n, V) of the tokens in each prompt, padding left out, for the repetition penalty; None where it is off."""
    if config.repetition_penalty == 1:
        return None
    present = torch.ones_like(input_ids) if segment_ids is None else (segment_ids > 0).long()
    counts = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.long, device=input_ids.device)
    return (counts.scatter_add_(1, input_ids, present) > 0).repeat_interleave(n, dim=0)


def _rows_of(state: DecodeState) -> Tensor:
    """The numbers of the rows that are still decoded."""
    return torch.arange(state.n_rows, device=state.tokens.device) if state.row_ids is None else state.row_ids


def _as_list(eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _unfinished(generated: list[list[int]], finished: Tensor) -> list[list[int] | None]:
    """The generated tokens of each row, None for finished rows, whose next token nothing restricts."""
    return [None if done else row for row, done in zip(generated, finished.tolist(), strict=True)]
