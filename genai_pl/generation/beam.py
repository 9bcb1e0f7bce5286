"""Beam search: the sequences of highest total log-probability, with transformers' rules for when to stop.

Each step extends `num_beams` sequences per prompt by one token, keeps the best `num_beams` unfinished ones, and collects
finished ones as hypotheses. Diverse beam search splits the beams into groups that avoid each other's tokens
(Vijayakumar et al. 2018). Beams are Python objects; only scores, logits and the cache are tensors.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.generation.banned_tokens import build_banned_tokens
from genai_pl.generation.decode import continuation_segments, evaluating, seen_tokens
from genai_pl.generation.decode_state import DecodeState, check_prompt
from genai_pl.generation.output_constraints import NO_CONSTRAINTS, OutputConstraints
from genai_pl.generation.processors import penalize
from genai_pl.models import Decoder, DecoderWithSource
from genai_pl.peft.adapter import RowWeights

IMPOSSIBLE = -1e9  # total of a placeholder
StopCheck = Callable[[int, Sequence[int]], bool]  # (number of the prompt, tokens of a continuation)


class Beam(NamedTuple):
    """An unfinished sequence, or a placeholder: `tokens` and the sum `total` of their processed log-probabilities.

    row: index into the batch of the row whose cache holds all tokens but the last. logprobs: the model's own, per token.
    """

    row: int
    tokens: list[int]
    total: float
    logprobs: list[float]

    @property
    def alive(self) -> bool:
        """False for a placeholder, which fills the batch but cannot win."""
        return self.total > IMPOSSIBLE / 2


class Hypothesis(NamedTuple):
    """A finished sequence: `tokens` with the end token, and `score`, its total / length ** length_penalty.

    logprobs: the model's own log-probability of each token.
    """

    tokens: list[int]
    score: float
    logprobs: list[float]


class BeamGroup:
    """The best `size` finished sequences of one prompt, or of one group of it; `open` until no unfinished one can join them."""

    def __init__(self, size: int, config: GenerationConfig) -> None:
        self.size, self.config = size, config
        self.finished: list[Hypothesis] = []
        self.open = True

    def add(self, beam: Beam) -> None:
        """Add a beam that just finished; only the best `size` remain."""
        if self.open and beam.alive:
            score = beam.total / len(beam.tokens) ** self.config.length_penalty
            self.finished.append(Hypothesis(beam.tokens, score, beam.logprobs))
            self.finished = sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[: self.size]

    def update_open(self, running: Sequence[Beam]) -> None:
        """Close the group if the unfinished beams cannot improve it, by the rule of early_stopping.

        "true": as soon as it is full. "false": when the best beam, at its present length, scores below the worst hypothesis.
        "never": when even at max_new_tokens it would; log-probabilities only decrease the total, so that bound is safe if
        length_penalty > 0, which rewards length.
        """
        # the comparison needs the best beam only: all beams of a group have the same length
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
    row_weights: RowWeights | None = None,
) -> list[list[Hypothesis]]:
    """The num_return best continuations of each prompt (B, T), best first; fewer where the rules leave fewer.

    constraints: its `ends` finish a sequence. stop_check: True for (number of the prompt, tokens) of a finished sequence.
    row_weights: weights of adapters for each prompt, (B,).
    """
    # masks, counts and rules, for B * k rows
    check_prompt(model, input_ids, segment_ids)
    (B, T), k = input_ids.shape, config.num_beams
    size = k // config.num_beam_groups
    segment = continuation_segments(segment_ids, k)
    seen = seen_tokens(input_ids, segment_ids, config, model.config.vocab_size, k)
    banned_tokens = build_banned_tokens(config, constraints, input_ids, segment_ids, model.config.vocab_size)
    groups = [BeamGroup(size, config) for _ in range(B * config.num_beam_groups)]
    # at first all beams of a group are the prompt: one of them counts
    beams = [Beam(n, [], IMPOSSIBLE if n % size else 0.0, []) for n in range(B * k)]
    with evaluating(model):
        # prefill each prompt once, then give every beam a row of the cache
        state = DecodeState(model, B, T + config.max_new_tokens - 1, row_weights)
        logits = state.forward(input_ids, segment_ids).repeat_interleave(k, dim=0)
        state.expand(k)
        for n_left in reversed(range(config.max_new_tokens)):
            # score all extensions, keep the best, then move each survivor's cache row to its place
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
    """The beams after one more token; those that finish are added to their groups.

    Groups choose one after the other, by totals minus diversity_penalty for each beam of an earlier group of the same prompt
    that takes the token in this step; the totals themselves have no such term (Vijayakumar et al. 2018, algorithm 1).
    scores: (B * k, V) processed log-probabilities. logprobs: the model's own. last: finish every beam.
    """
    size, beams_after = groups[0].size, []
    taken = torch.zeros(scores.shape[1], device=scores.device)  # (V,)
    for number, group in enumerate(groups):
        prompt, place = divmod(number, config.num_beam_groups)
        if place == 0:
            taken.zero_()
        # the best extensions of this group, more than it needs: some of them finish
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
        # transformers' rule: a finished sequence counts only if it is among the best `size` extensions
        for beam, done in list(zip(candidates, is_finished, strict=True))[:size]:
            if done:
                group.add(beam)
        # unfinished beams continue; placeholders fill the batch where too few are left
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
    """The best one-token extensions of some beams: enough that all beams go on even if some extensions finish.

    beams: those in rows `first` onwards. scores, logprobs: (size, V). penalty: (V,) subtracted for the choice alone.
    n_ends: number of end tokens; each beam may lose one extension to each of them.
    """
    size, V = scores.shape
    # topk over all beams at once: the flat index is beam * V + token
    totals = scores + torch.tensor([[beam.total] for beam in beams], device=scores.device)
    places = (totals - penalty).flatten().topk(min(max(2, 1 + n_ends), V) * size).indices
    rows = zip(places.tolist(), totals.flatten()[places].tolist(), logprobs.flatten()[places].tolist(), strict=True)
    return [
        Beam(first + i // V, [*beams[i // V].tokens, i % V], total, [*beams[i // V].logprobs, logprob])
        for i, total, logprob in rows
    ]


def _best(groups: Sequence[BeamGroup], n: int) -> list[Hypothesis]:
    """The best n hypotheses of all groups of a prompt."""
    finished = [hypothesis for group in groups for hypothesis in group.finished]
    return sorted(finished, key=lambda hypothesis: -hypothesis.score)[:n]
