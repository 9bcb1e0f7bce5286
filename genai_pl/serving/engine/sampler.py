"""Sampling: the next token of each request in a batch, by its own settings.

Requests with equal settings go through the logits processors together, as one (B, V) tensor; the draw itself is one request
at a time, from its own generator. So a seed gives one answer whatever else is in the batch, and an exception ends the request
that caused it: settings that fail as a group are tried one by one.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from genai_pl.generation import draw_token, process
from genai_pl.serving.engine.request import SampledToken
from genai_pl.serving.engine.request_state import RequestState, isolate_failure

log = logging.getLogger("genai_pl.serving")


def sample(logits: Tensor, states: Sequence[RequestState]) -> list[SampledToken | None]:
    """The next token of each request from its row of the logits (B, V).

    None for a request that has a finish_reason, or gets "error" here: its logits are not finite, or its settings fail.
    """
    sampled: list[SampledToken | None] = [None] * len(states)
    tokens: dict[int, Tensor] = {}
    banned = _banned(logits, states)
    # requests by settings: those of one group are processed together
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for n, state in enumerate(states):
        if state.finish_reason is None:
            c = state.config
            penalties = (c.repetition_penalty, c.presence_penalty, c.frequency_penalty)
            settings = (c.temperature, c.top_k, c.top_p, c.min_p, *penalties, tuple(c.logit_bias.items()))
            groups[(*settings, state.banned_tokens is None)].append(n)
    # a token for each; they stay on the device, so that the whole batch waits for it once
    for members in groups.values():
        for n, options in _options(logits, states, members, banned):
            with isolate_failure(states[n]):
                tokens[n] = options if options.dim() == 0 else _draw(options, states[n])
    # log-probabilities, where they are asked for
    for n, token in zip(tokens, torch.stack(list(tokens.values())).tolist() if tokens else [], strict=True):
        with isolate_failure(states[n]):
            sampled[n] = _with_logprobs(logits[n], token, states[n].request.logprobs)
    return sampled


def _banned(logits: Tensor, states: Sequence[RequestState]) -> dict[int, Tensor]:
    """Masks (V,) of the tokens that bans and grammars exclude, by index of the request; only for requests that have some."""
    for state, ok in zip(states, logits.amax(dim=-1).isfinite().tolist(), strict=True):
        if not ok:
            log.error("a row of the model's logits is not finite: its answer ends")
            state.finish_reason = "error"
    banned = {}
    for n, state in enumerate(states):
        if state.banned_tokens is not None and state.finish_reason is None:
            with isolate_failure(state):
                banned[n] = state.banned_tokens.mask([state.output_ids], logits.device)[0]
    return banned


def _options(
    logits: Tensor, states: Sequence[RequestState], members: list[int], banned: dict[int, Tensor]
) -> list[tuple[int, Tensor]]:
    """(index, likeliest token () or probabilities (V,)) of each member of a group with equal settings."""
    try:
        return list(zip(members, _processed(logits, states, members, banned), strict=True))
    except Exception:
        if len(members) > 1:  # one of them is to blame: find it
            return [option for n in members for option in _options(logits, states, [n], banned)]
        with isolate_failure(states[members[0]]):
            raise
        return []


def _processed(logits: Tensor, states: Sequence[RequestState], members: list[int], banned: dict[int, Tensor]) -> Tensor:
    """Of a group's B members the likeliest tokens (B,) at temperature 0, else probabilities (B, V)."""
    config = states[members[0]].config
    seen = None if config.repetition_penalty == 1 else torch.stack([states[n].seen_tokens for n in members])
    counts = torch.stack([states[n].token_counts for n in members]) if config.counts_tokens else None
    masks = torch.stack([banned[n] for n in members]) if members[0] in banned else None
    logits = logits if len(members) == len(states) else logits[members]  # no copy in the common case
    logits = process(logits, config, seen=seen, banned=masks, counts=counts)
    return logits.argmax(dim=-1) if config.temperature == 0 else logits.softmax(dim=-1)


def _draw(probabilities: Tensor, state: RequestState) -> Tensor:
    """A token () drawn from probabilities (V,) with the request's own generator."""
    return draw_token(probabilities[None], state.generator)[0]


def _with_logprobs(logits: Tensor, token: int, n: int | None) -> SampledToken:
    """The token with log-probabilities of it and of the n likeliest, from the model's logits (V,) before processing."""
    if n is None:
        return SampledToken(token, None, ())
    logprobs = logits.float().log_softmax(dim=-1)  # (V,)
    best = logprobs.topk(min(n, len(logprobs)))
    return SampledToken(
        token, logprobs[token].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )
