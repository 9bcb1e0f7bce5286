"""Speculative decoding: tokens are proposed cheaply, and the model reads several at once to accept or reject them."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genai_pl.generation.context import Follower, check_prompt
from genai_pl.generation.decode import evaluating, seen_tokens
from genai_pl.generation.drafts import Proposer
from genai_pl.generation.limits import NO_LIMITS, Limits
from genai_pl.generation.processors import process, token_logprobs
from genai_pl.generation.rules import build_rules
from genai_pl.models import Decoder
from genai_pl.specs import GenerationConfig


@dataclass
class Acceptance:
    """How many tokens were proposed and accepted, and how many were written in how many calls of the model."""

    proposed: int = 0
    accepted: int = 0
    written: int = 0
    reads: int = 0

    def __str__(self) -> str:
        share, each = self.accepted / max(1, self.proposed), self.written / max(1, self.reads)
        return f"{share:.0%} of {self.proposed} proposed tokens accepted, {each:.2f} tokens for each call of the model"


class Target:
    """The model whose distribution counts, with one prompt; it reads it once for all continuations."""

    def __init__(
        self, model: Decoder, prompt: Sequence[int], config: GenerationConfig, limits: Limits = NO_LIMITS
    ) -> None:
        self.prompt, self.config = list(prompt), config
        self.follower = Follower(model, len(self.prompt) + config.max_new_tokens - 1)
        self.input_ids = torch.tensor([self.prompt], device=self.follower.device)
        check_prompt(model, self.input_ids, None)
        self.rules = build_rules(config, limits, self.input_ids, None, model.config.vocab_size)

    def processed(self, logits: Tensor, written: list[int]) -> Tensor:
        """Logits (1, V) that are sampled from after the prompt and what is written, of the model's own (1, V)."""
        text = torch.cat([self.input_ids, self.input_ids.new_tensor([written])], dim=1)
        seen = seen_tokens(text, None, self.config, logits.shape[1], 1)
        excluded = None if self.rules is None else self.rules.excluded([written], logits.device)
        return process(logits, self.config, seen=seen, excluded=excluded)


@torch.no_grad()
def speculate(
    target: Target,
    proposer: Proposer,
    *,
    generator: torch.Generator | None = None,
    finished: Tensor | None = None,
    logprobs: list[Tensor] | None = None,
    acceptance: Acceptance | None = None,
) -> Generator[Tensor, None, None]:
    """The tokens of one continuation, (1,) each, as `decode` yields them and of the same distribution.

    `finished` (1,) bool is the caller's, `logprobs` as for `decode`; `acceptance` is counted up.
    """
    config, follower = target.config, target.follower
    counts = Acceptance() if acceptance is None else acceptance
    written: list[int] = []
    with evaluating(follower.model):
        while len(written) < config.max_new_tokens:
            text = target.prompt + written
            room = min(config.draft_tokens, config.max_new_tokens - len(written) - 1, follower.room(text))
            proposed, q = proposer.propose(text, room, generator) if room else ([], None)
            logits = follower.read(text + proposed, len(proposed) + 1)
            counts.proposed += len(proposed)
            counts.reads += 1
            for i, own in enumerate(logits.split(1)):  # (1, V)
                guess = proposed[i] if i < len(proposed) else None
                token = _accept(
                    target.processed(own, written), guess, None if q is None else q[i : i + 1], config, generator
                )
                if logprobs is not None:
                    logprobs.append(token_logprobs(own, token))
                written.append(int(token))
                counts.written += 1
                counts.accepted += written[-1] == guess
                yield token
                if finished is not None and finished.all():
                    return
                if written[-1] != guess:
                    break


def _accept(
    logits: Tensor, guess: int | None, q: Tensor | None, config: GenerationConfig, generator: torch.Generator | None
) -> Tensor:
    """The next token (1,), the guess if it is accepted; q (1, V) is what it was drawn from, None: it was certain.

    With probability min(1, p(guess) / q(guess)) it is the guess, else it is drawn from max(0, p - q), normalized; that is
    a draw from p (Leviathan et al. 2023, algorithm 1). Greedy decoding takes the likeliest whatever was guessed.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    p = logits.softmax(dim=-1)  # (1, V)
    if guess is None:
        return torch.multinomial(p, 1, generator=generator)[0]
    if q is None:
        q = torch.zeros_like(p)
        q[0, guess] = 1.0
    draw = torch.rand((), generator=generator, device=p.device)
    if draw * q[0, guess] < p[0, guess]:
        return torch.tensor([guess], device=p.device)
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)  # p and q alike but for rounding
    return torch.multinomial(rest, 1, generator=generator)[0]
