"""Beam search: the sequences that are likeliest as a whole, with transformers' rules for when one ends."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.banned_tokens import build_banned_tokens
from genai_pl.generation.decode import continued, evaluating, seen_tokens
from genai_pl.generation.decode_state import DecodeState, check_prompt
from genai_pl.generation.output_constraints import NO_CONSTRAINTS, OutputConstraints
from genai_pl.generation.processors import penalize
from genai_pl.models import Decoder, DecoderWithSource

IMPOSSIBLE = -1e9  # the sum of a beam that is none: not begun yet, ended, or excluded
StopCheck = Callable[[int, Sequence[int]], bool]  # (number of the prompt, tokens of a continuation)


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


class BeamGroup:
    """The best sequences of one prompt that have ended; of diverse beam search, those of one of its groups."""

    def __init__(self, size: int, config: GenerationConfig) -> None:
        self.size, self.config = size, config
        self.finished: list[Hypothesis] = []
        self.open = True  # whether one that goes on might get among them

    def add(self, beam: Beam) -> None:
        """Keep a sequence that ended if it is one of the best."""
        if self.open and beam.alive:
            score = beam.total / len(beam.tokens) ** self.config.length_penalty
            self.finished.append(Hypothesis(beam.tokens, score, beam.logprobs))
            self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[: self.size]

    def update_open(self, running: Sequence[Beam]) -> None:
        """Close the group if those that go on cannot get among those that ended, as early_stopping decides it."""
        best = max(running, key=lambda beam: beam.total)
        if len(self.finished) < self.size:
            self.open &= best.alive
            return
        if self.config.early_stopping == "true":
            self.open = False
            return
        hopes = self.config.early_stopping == "never" and self.config.length_penalty > 0
        length = self.config.max_new_tokens if hopes else len(best.tokens)
        self.open &= best.total / length**self.config.length_penalty > self.finished[-1].score


@torch.no_grad()
def beam_search(
    model: Decoder | DecoderWithSource,
    input_ids: Tensor,
    config: GenerationConfig,
    *,
    segment_ids: Tensor | None = None,
    constraints: OutputConstraints = NO_CONSTRAINTS,
    stop_check: StopCheck | None = None,
) -> list[list[Hypothesis]]:
    """The num_return best continuations of each prompt (B, T), the best first; the token that ended one is part of it.

    The tokens in `constraints.ends` end a sequence, and so may `stop_check`. Where the rules leave fewer, fewer are returned.
    """
    check_prompt(model, input_ids, segment_ids)
    (B, T), k = input_ids.shape, config.num_beams
    size = k // config.num_beam_groups
    segment = continued(segment_ids, k)
    seen = seen_tokens(input_ids, segment_ids, config, model.config.vocab_size, k)
    banned_tokens = build_banned_tokens(config, constraints, input_ids, segment_ids, model.config.vocab_size)
    groups = [BeamGroup(size, config) for _ in range(B * config.num_beam_groups)]
    # at first all beams of a group are the prompt: one of them counts
    beams = [Beam(n, [], IMPOSSIBLE if n % size else 0.0, []) for n in range(B * k)]
    with evaluating(model):
        state = DecodeState(model, B, T + config.max_new_tokens - 1)
        logits = state.forward(input_ids, segment_ids).repeat_interleave(k, dim=0)
        state.expand(k)
        for n_left in reversed(range(config.max_new_tokens)):
            logprobs = logits.float().log_softmax(dim=-1)  # (B * k, V)
            banned = None
            if banned_tokens is not None:
                rows = [beam.tokens if beam.alive else None for beam in beams]
                banned = banned_tokens.mask(rows, logprobs.device, strict=False)
            scores = penalize(logprobs, config, seen=seen, banned=banned)
            beams = _extend(beams, groups, scores, logprobs, config, constraints.ends, stop_check, last=n_left == 0)
            if n_left == 0 or not any(group.open for group in groups):
                break
            rows = torch.tensor([beam.row for beam in beams], device=logprobs.device)
            tokens = torch.tensor([beam.tokens[-1:] for beam in beams], device=logprobs.device)  # (B * k, 1)
            seen = None if seen is None else seen[rows].scatter_(1, tokens, True)
            state.reorder(rows)
            logits = state.forward(tokens, segment)
    return [_best(groups[i : i + k // size], config.num_return) for i in range(0, len(groups), k // size)]


def _extend(
    beams: list[Beam],
    groups: list[BeamGroup],
    scores: Tensor,
    logprobs: Tensor,
    config: GenerationConfig,
    ends: frozenset[int],
    stop_check: StopCheck | None,
    *,
    last: bool,
) -> list[Beam]:
    """The beams that go on by one token; those that end are added to their groups.

    Groups choose one after the other, by totals less diversity_penalty for each beam of an earlier group of the prompt
    that takes the token in this step; the totals themselves have no such term (Vijayakumar et al. 2018, algorithm 1).
    """
    size, beams_after = groups[0].size, []
    taken = torch.zeros(scores.shape[1], device=scores.device)  # (V,)
    for number, group in enumerate(groups):
        prompt, place = divmod(number, config.num_beam_groups)
        if place == 0:
            taken.zero_()
        rows = slice(number * size, (number + 1) * size)
        candidates = _candidates(
            beams[rows], rows.start, scores[rows], logprobs[rows], config.diversity_penalty * taken, len(ends)
        )
        is_finished = [
            last
            or beam.tokens[-1] in ends
            or (stop_check is not None and beam.alive and stop_check(prompt, beam.tokens))
            for beam in candidates
        ]
        for beam, done in list(zip(candidates, is_finished, strict=True))[:size]:  # the others are there to go on
            if done:
                group.add(beam)
        running = [beam for beam, done in zip(candidates, is_finished, strict=True) if not done]
        running += [beam._replace(total=IMPOSSIBLE) for beam, done in zip(candidates, is_finished, strict=True) if done]
        group.update_open(running[:size])
        beams_after += running[:size]
        for beam in running[:size]:
            taken[beam.tokens[-1]] += 1
    return beams_after


def _candidates(
    beams: Sequence[Beam], first: int, scores: Tensor, logprobs: Tensor, penalty: Tensor, n_ends: int
) -> list[Beam]:
    """The best continuations of some beams by a token each, enough for all of them to go on if any end.

    The beams are the rows of the batch from `first` on; scores and logprobs (size, V), penalty (V,).
    """
    size, V = scores.shape
    totals = scores + torch.tensor([[beam.total] for beam in beams], device=scores.device)
    places = (totals - penalty).flatten().topk(min(max(2, 1 + n_ends), V) * size).indices
    rows = zip(places.tolist(), totals.flatten()[places].tolist(), logprobs.flatten()[places].tolist(), strict=True)
    return [
        Beam(first + i // V, [*beams[i // V].tokens, i % V], total, [*beams[i // V].logprobs, logprob])
        for i, total, logprob in rows
    ]


def _best(groups: Sequence[BeamGroup], n: int) -> list[Hypothesis]:
    """The best of all groups of a prompt."""
    finished = [hypothesis for group in groups for hypothesis in group.finished]
    return sorted(finished, key=lambda hypothesis: -hypothesis.score)[:n]
