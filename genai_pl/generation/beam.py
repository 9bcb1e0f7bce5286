"""Beam search: the sequences that are likeliest as a whole, with transformers' rules for when one ends."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.banned_tokens import build_rules
from genai_pl.generation.decode import continued, evaluating, seen_tokens
from genai_pl.generation.decode_state import Context, check_prompt
from genai_pl.generation.output_constraints import NO_LIMITS, Limits
from genai_pl.generation.processors import penalize
from genai_pl.models import Decoder, DecoderWithSource

IMPOSSIBLE = -1e9  # the sum of a beam that is none: not begun yet, ended, or excluded
Stopped = Callable[[int, Sequence[int]], bool]  # (number of the prompt, tokens of a continuation)


class Beam(NamedTuple):
    """A continuation: the row of the batch that has read all but its last token, and its sum of log-probabilities."""

    row: int
    tokens: list[int]
    total: float
    logprobs: list[float]  # the model's own, of each token

    @property
    def alive(self) -> bool:
        return self.total > IMPOSSIBLE / 2


class Hypothesis(NamedTuple):
    """A continuation that has ended; its score is the sum of log-probabilities over length ** length_penalty."""

    tokens: list[int]
    score: float
    logprobs: list[float]


class Group:
    """The best sequences of one prompt that have ended; of diverse beam search, those of one of its groups."""

    def __init__(self, size: int, config: GenerationConfig) -> None:
        self.size, self.config = size, config
        self.ended: list[Hypothesis] = []
        self.open = True  # whether one that goes on might get among them

    def add(self, beam: Beam) -> None:
        """Keep a sequence that ended if it is one of the best."""
        if self.open and beam.alive:
            score = beam.total / len(beam.tokens) ** self.config.length_penalty
            self.ended.append(Hypothesis(beam.tokens, score, beam.logprobs))
            self.ended = sorted(self.ended, key=lambda hypothesis: -hypothesis.score)[: self.size]

    def judge(self, going: Sequence[Beam]) -> None:
        """Close the group if those that go on cannot get among those that ended, as early_stopping decides it."""
        best = max(going, key=lambda beam: beam.total)
        if len(self.ended) < self.size:
            self.open &= best.alive
            return
        if self.config.early_stopping == "true":
            self.open = False
            return
        hopes = self.config.early_stopping == "never" and self.config.length_penalty > 0
        length = self.config.max_new_tokens if hopes else len(best.tokens)
        self.open &= best.total / length**self.config.length_penalty > self.ended[-1].score


@torch.no_grad()
def beam_search(
    model: Decoder | DecoderWithSource,
    input_ids: Tensor,
    config: GenerationConfig,
    *,
    segment_ids: Tensor | None = None,
    limits: Limits = NO_LIMITS,
    stopped: Stopped | None = None,
) -> list[list[Hypothesis]]:
    """The num_return best continuations of each prompt (B, T), the best first; the token that ended one is part of it.

    The tokens in `limits.ends` end a sequence, and so may `stopped`. Where the rules leave fewer, fewer are returned.
    """
    check_prompt(model, input_ids, segment_ids)
    (B, T), k = input_ids.shape, config.num_beams
    size = k // config.num_beam_groups
    segment = continued(segment_ids, k)
    seen = seen_tokens(input_ids, segment_ids, config, model.config.vocab_size, k)
    rules = build_rules(config, limits, input_ids, segment_ids, model.config.vocab_size)
    groups = [Group(size, config) for _ in range(B * config.num_beam_groups)]
    # at first all beams of a group are the prompt: one of them counts
    beams = [Beam(n, [], IMPOSSIBLE if n % size else 0.0, []) for n in range(B * k)]
    with evaluating(model):
        context = Context(model, B, T + config.max_new_tokens - 1)
        logits = context.read(input_ids, segment_ids).repeat_interleave(k, dim=0)
        context.expand(k)
        for n_left in reversed(range(config.max_new_tokens)):
            own = logits.float().log_softmax(dim=-1)  # (B * k, V)
            excluded = None
            if rules is not None:
                rows = [beam.tokens if beam.alive else None for beam in beams]
                excluded = rules.excluded(rows, own.device, strict=False)
            steps = penalize(own, config, seen=seen, excluded=excluded)
            beams = _grow(beams, groups, steps, own, config, limits.ends, stopped, last=n_left == 0)
            if n_left == 0 or not any(group.open for group in groups):
                break
            rows = torch.tensor([beam.row for beam in beams], device=own.device)
            tokens = torch.tensor([beam.tokens[-1:] for beam in beams], device=own.device)  # (B * k, 1)
            seen = None if seen is None else seen[rows].scatter_(1, tokens, True)
            context.reorder(rows)
            logits = context.read(tokens, segment)
    return [_best(groups[i : i + k // size], config.num_return) for i in range(0, len(groups), k // size)]


def _grow(
    beams: list[Beam],
    groups: list[Group],
    steps: Tensor,
    own: Tensor,
    config: GenerationConfig,
    ends: frozenset[int],
    stopped: Stopped | None,
    *,
    last: bool,
) -> list[Beam]:
    """The beams that go on by one token; those that end are added to their groups.

    Groups choose one after the other, by totals less diversity_penalty for each beam of an earlier group of the prompt
    that takes the token in this step; the totals themselves have no such term (Vijayakumar et al. 2018, algorithm 1).
    """
    size, grown = groups[0].size, []
    taken = torch.zeros(steps.shape[1], device=steps.device)  # (V,)
    for number, group in enumerate(groups):
        prompt, place = divmod(number, config.num_beam_groups)
        if place == 0:
            taken.zero_()
        mine = slice(number * size, (number + 1) * size)
        found = _candidates(
            beams[mine], mine.start, steps[mine], own[mine], config.diversity_penalty * taken, len(ends)
        )
        over = [
            last or beam.tokens[-1] in ends or (stopped is not None and beam.alive and stopped(prompt, beam.tokens))
            for beam in found
        ]
        for beam, is_over in list(zip(found, over, strict=True))[:size]:  # the others are there to go on
            if is_over:
                group.add(beam)
        going = [beam for beam, is_over in zip(found, over, strict=True) if not is_over]
        going += [beam._replace(total=IMPOSSIBLE) for beam, is_over in zip(found, over, strict=True) if is_over]
        group.judge(going[:size])
        grown += going[:size]
        for beam in going[:size]:
            taken[beam.tokens[-1]] += 1
    return grown


def _candidates(
    beams: Sequence[Beam], first: int, steps: Tensor, own: Tensor, handicap: Tensor, n_ends: int
) -> list[Beam]:
    """The best continuations of some beams by a token each, enough for all of them to go on if any end.

    The beams are the rows of the batch from `first` on; steps and own (size, V), handicap (V,).
    """
    size, V = steps.shape
    totals = steps + torch.tensor([[beam.total] for beam in beams], device=steps.device)
    places = (totals - handicap).flatten().topk(min(max(2, 1 + n_ends), V) * size).indices
    rows = zip(places.tolist(), totals.flatten()[places].tolist(), own.flatten()[places].tolist(), strict=True)
    return [
        Beam(first + i // V, [*beams[i // V].tokens, i % V], total, [*beams[i // V].logprobs, logprob])
        for i, total, logprob in rows
    ]


def _best(groups: Sequence[Group], n: int) -> list[Hypothesis]:
    """The best of all groups of a prompt."""
    ended = [hypothesis for group in groups for hypothesis in group.ended]
    return sorted(ended, key=lambda hypothesis: -hypothesis.score)[:n]
