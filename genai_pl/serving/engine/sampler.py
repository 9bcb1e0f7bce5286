"""The next token of every row of a batch, each chosen as its request says."""

import logging
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from genai_pl.generation import process
from genai_pl.serving.engine.request import SampledToken
from genai_pl.serving.engine.request_state import RequestState, isolate_failure

log = logging.getLogger("genai_pl.serving")


def sample(logits: Tensor, states: Sequence[RequestState]) -> list[SampledToken | None]:
    """The token of each row by its logits (B, V); None, and `ending` error, where there can be none."""
    sampled: list[SampledToken | None] = [None] * len(states)
    tokens: dict[int, Tensor] = {}
    excluded = _excluded(logits, states)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for n, state in enumerate(states):
        if state.finish_reason is None:
            c = state.config
            way = (c.temperature, c.top_k, c.top_p, c.min_p, c.repetition_penalty, tuple(c.logit_bias.items()))
            groups[(*way, state.rules is None)].append(n)
    for members in groups.values():
        for n, options in _options(logits, states, members, excluded):
            with isolate_failure(states[n]):
                tokens[n] = options if options.dim() == 0 else _drawn(options, states[n])
    for n, token in zip(tokens, torch.stack(list(tokens.values())).tolist() if tokens else [], strict=True):
        with isolate_failure(states[n]):
            sampled[n] = _with_logprobs(logits[n], token, states[n].request.logprobs)
    return sampled


def _excluded(logits: Tensor, states: Sequence[RequestState]) -> dict[int, Tensor]:
    """What the rules of each row that has some exclude, (V,)."""
    for state, ok in zip(states, logits.amax(dim=-1).isfinite().tolist(), strict=True):
        if not ok:
            log.error("a row of the model's logits is not finite: its answer ends")
            state.finish_reason = "error"
    excluded = {}
    for n, state in enumerate(states):
        if state.rules is not None and state.finish_reason is None:
            with isolate_failure(state):
                excluded[n] = state.rules.excluded([state.output_ids], logits.device)[0]
    return excluded


def _options(
    logits: Tensor, states: Sequence[RequestState], members: list[int], excluded: dict[int, Tensor]
) -> list[tuple[int, Tensor]]:
    """Of rows that choose in the same way, each with its likeliest token () or its probabilities (V,)."""
    try:
        return list(zip(members, _processed(logits, states, members, excluded), strict=True))
    except Exception:
        if len(members) > 1:  # one of them is to blame
            return [option for n in members for option in _options(logits, states, [n], excluded)]
        with isolate_failure(states[members[0]]):
            raise
        return []


def _processed(
    logits: Tensor, states: Sequence[RequestState], members: list[int], excluded: dict[int, Tensor]
) -> Tensor:
    """The likeliest token of each row (B,) or, where they draw, probabilities (B, V)."""
    config = states[members[0]].config
    seen = None if config.repetition_penalty == 1 else torch.stack([states[n].seen_tokens for n in members])
    hidden = torch.stack([excluded[n] for n in members]) if members[0] in excluded else None
    some = logits if len(members) == len(states) else logits[members]
    some = process(some, config, seen=seen, excluded=hidden)
    return some.argmax(dim=-1) if config.temperature == 0 else some.softmax(dim=-1)


def _drawn(probabilities: Tensor, state: RequestState) -> Tensor:
    """A token () from the row's own generator, so that nobody's draws depend on who else is there."""
    return torch.multinomial(probabilities, 1, generator=state.generator)[0]


def _with_logprobs(logits: Tensor, token: int, n: int | None) -> SampledToken:
    if n is None:
        return SampledToken(token, None, ())
    logprobs = logits.float().log_softmax(dim=-1)  # (V,)
    best = logprobs.topk(min(n, len(logprobs)))
    return SampledToken(
        token, logprobs[token].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )
