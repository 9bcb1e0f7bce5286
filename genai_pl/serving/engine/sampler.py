"""The next token of every row of a batch, each chosen as its request says."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.generation import process
from genai_pl.serving.engine.request_state import Row, ending_alone

log = logging.getLogger("genai_pl.serving")


class Chosen(NamedTuple):
    """A token and, if the request asks for them, log-probabilities."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def choose(logits: Tensor, rows: Sequence[Row]) -> list[Chosen | None]:
    """The token of each row by its logits (B, V); None, and `ending` error, where there can be none."""
    chosen: list[Chosen | None] = [None] * len(rows)
    tokens: dict[int, Tensor] = {}
    banned = _banned(logits, rows)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for n, row in enumerate(rows):
        if row.ending is None:
            c = row.config
            way = (c.temperature, c.top_k, c.top_p, c.min_p, c.repetition_penalty, tuple(c.logit_bias.items()))
            groups[(*way, row.banned_tokens is None)].append(n)
    for members in groups.values():
        for n, options in _options(logits, rows, members, banned):
            with ending_alone(rows[n]):
                tokens[n] = options if options.dim() == 0 else _drawn(options, rows[n])
    for n, token in zip(tokens, torch.stack(list(tokens.values())).tolist() if tokens else [], strict=True):
        with ending_alone(rows[n]):
            chosen[n] = _with_logprobs(logits[n], token, rows[n].request.logprobs)
    return chosen


def _banned(logits: Tensor, rows: Sequence[Row]) -> dict[int, Tensor]:
    """What the rules of each row that has some exclude, (V,)."""
    for row, ok in zip(rows, logits.amax(dim=-1).isfinite().tolist(), strict=True):
        if not ok:
            log.error("a row of the model's logits is not finite: its answer ends")
            row.ending = "error"
    banned = {}
    for n, row in enumerate(rows):
        if row.banned_tokens is not None and row.ending is None:
            with ending_alone(row):
                banned[n] = row.banned_tokens.mask([row.written], logits.device)[0]
    return banned


def _options(
    logits: Tensor, rows: Sequence[Row], members: list[int], banned: dict[int, Tensor]
) -> list[tuple[int, Tensor]]:
    """Of rows that choose in the same way, each with its likeliest token () or its probabilities (V,)."""
    try:
        return list(zip(members, _processed(logits, rows, members, banned), strict=True))
    except Exception:
        if len(members) > 1:  # one of them is to blame
            return [found for n in members for found in _options(logits, rows, [n], banned)]
        with ending_alone(rows[members[0]]):
            raise
        return []


def _processed(logits: Tensor, rows: Sequence[Row], members: list[int], banned: dict[int, Tensor]) -> Tensor:
    """The likeliest token of each row (B,) or, where they draw, probabilities (B, V)."""
    config = rows[members[0]].config
    seen = None if config.repetition_penalty == 1 else torch.stack([rows[n].seen for n in members])
    hidden = torch.stack([banned[n] for n in members]) if members[0] in banned else None
    some = logits if len(members) == len(rows) else logits[members]
    some = process(some, config, seen=seen, banned=hidden)
    return some.argmax(dim=-1) if config.temperature == 0 else some.softmax(dim=-1)


def _drawn(probabilities: Tensor, row: Row) -> Tensor:
    """A token () from the row's own generator, so that nobody's draws depend on who else is there."""
    return torch.multinomial(probabilities, 1, generator=row.generator)[0]


def _with_logprobs(logits: Tensor, token: int, n: int | None) -> Chosen:
    if n is None:
        return Chosen(token, None, ())
    logprobs = logits.float().log_softmax(dim=-1)  # (V,)
    best = logprobs.topk(min(n, len(logprobs)))
    return Chosen(token, logprobs[token].item(), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
