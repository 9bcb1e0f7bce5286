"""Speculative decoding: tokens are proposed cheaply, and the model reads several at once to accept or reject them."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from genai_pl.config.enums import Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation.banned_tokens import build_banned_tokens
from genai_pl.generation.decode import evaluating, seen_tokens
from genai_pl.generation.decode_state import PrefixReuseState, check_prompt
from genai_pl.generation.output_constraints import NO_CONSTRAINTS, OutputConstraints
from genai_pl.generation.processors import process, token_logprobs
from genai_pl.models import Decoder


class DraftProposer(Protocol):
    """What guesses how a text goes on."""

    def propose(self, text: list[int], n: int, generator: torch.Generator | None) -> tuple[list[int], Tensor | None]:
        """At most n tokens, and the probabilities (n, V) that they were drawn from; None: they were not drawn."""
        ...


class PromptLookup:
    """What followed the last `ngram` tokens, or as many as possible, where they stood before (Saxena 2023)."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram

    def propose(self, text: list[int], n: int, generator: torch.Generator | None) -> tuple[list[int], Tensor | None]:
        """The tokens after the latest place that is like the end of the text."""
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            tail = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == tail:
                    return text[start + size : start + size + n], None
        return [], None


class DraftModel:
    """A smaller model in evaluation mode, whose tokens mean the same."""

    def __init__(self, model: Decoder, config: GenerationConfig, *, n_tokens: int, vocab_size: int) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.state = PrefixReuseState(model, n_tokens)

    @torch.no_grad()
    def propose(self, text: list[int], n: int, generator: torch.Generator | None) -> tuple[list[int], Tensor | None]:
        """Tokens that the draft writes, as it would alone; none after a token that it does not know."""
        if max(text) >= self.state.model.config.vocab_size:
            return [], None
        tokens: list[int] = []
        probabilities = []
        for _ in range(min(n, 1 + self.state.remaining(text))):
            logits = process(self.state.forward([*text, *tokens], 1)[:, : self.vocab_size], self.config)
            if self.config.temperature == 0:
                tokens.append(int(logits.argmax()))
                continue
            probabilities.append(self._padded(logits.softmax(dim=-1)))
            tokens.append(int(torch.multinomial(probabilities[-1], 1, generator=generator)))
        return tokens, torch.cat(probabilities) if probabilities else None

    def _padded(self, probabilities: Tensor) -> Tensor:
        """(1, V) of the model's vocabulary: the draft's may be rounded up less."""
        missing = self.vocab_size - probabilities.shape[1]
        return torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities


def build_proposer(config: GenerationConfig, draft: Decoder | None, *, n_tokens: int, vocab_size: int) -> DraftProposer:
    """What the options ask for, for one text of at most n_tokens."""
    if config.prompt_lookup is not None:
        return PromptLookup(config.prompt_lookup)
    if draft is None:
        raise ConfigError(f"generation.draft={config.draft}: nothing is loaded here; give the model as draft=")
    if draft.config.shape is not Shape.decoder or not draft.config.writes:
        raise ConfigError(f"generation.draft={config.draft}: a draft is a decoder that writes text")
    return DraftModel(draft, config, n_tokens=n_tokens, vocab_size=vocab_size)


@dataclass
class Acceptance:
    """How many tokens were proposed and accepted, and how many were generated in how many calls of the model."""

    proposed: int = 0
    accepted: int = 0
    generated: int = 0
    forward_passes: int = 0

    def __str__(self) -> str:
        share, each = self.accepted / max(1, self.proposed), self.generated / max(1, self.forward_passes)
        return f"{share:.0%} of {self.proposed} proposed tokens accepted, {each:.2f} tokens for each call of the model"


class TargetModel:
    """The model whose distribution counts, with one prompt; it reads it once for all continuations."""

    def __init__(
        self,
        model: Decoder,
        prompt: Sequence[int],
        config: GenerationConfig,
        constraints: OutputConstraints = NO_CONSTRAINTS,
    ) -> None:
        self.prompt, self.config = list(prompt), config
        self.state = PrefixReuseState(model, len(self.prompt) + config.max_new_tokens - 1)
        self.input_ids = torch.tensor([self.prompt], device=self.state.device)
        check_prompt(model, self.input_ids, None)
        self.banned_tokens = build_banned_tokens(config, constraints, self.input_ids, None, model.config.vocab_size)

    def process(self, logits: Tensor, generated: list[int]) -> Tensor:
        """Logits (1, V) that are sampled from after the prompt and what is generated, of the model's own (1, V)."""
        text = torch.cat([self.input_ids, self.input_ids.new_tensor([generated])], dim=1)
        seen = seen_tokens(text, None, self.config, logits.shape[1], 1)
        banned = None if self.banned_tokens is None else self.banned_tokens.mask([generated], logits.device)
        return process(logits, self.config, seen=seen, banned=banned)


@torch.no_grad()
def speculate(
    target: TargetModel,
    proposer: DraftProposer,
    *,
    generator: torch.Generator | None = None,
    finished: Tensor | None = None,
    logprobs: list[Tensor] | None = None,
    acceptance: Acceptance | None = None,
) -> Generator[Tensor, None, None]:
    """The tokens of one continuation, (1,) each, as `decode` yields them and of the same distribution.

    `finished` (1,) bool is the caller's, `logprobs` as for `decode`; `acceptance` is counted up.
    """
    config, state = target.config, target.state
    counts = Acceptance() if acceptance is None else acceptance
    generated: list[int] = []
    with evaluating(state.model):
        while len(generated) < config.max_new_tokens:
            text = target.prompt + generated
            n_draft = min(config.draft_tokens, config.max_new_tokens - len(generated) - 1, state.remaining(text))
            proposed, q = proposer.propose(text, n_draft, generator) if n_draft else ([], None)
            logits = state.forward(text + proposed, len(proposed) + 1)
            counts.proposed += len(proposed)
            counts.forward_passes += 1
            for i, target_logits in enumerate(logits.split(1)):  # (1, V)
                draft_token = proposed[i] if i < len(proposed) else None
                token = _accept(
                    target.process(target_logits, generated),
                    draft_token,
                    None if q is None else q[i : i + 1],
                    config,
                    generator,
                )
                if logprobs is not None:
                    logprobs.append(token_logprobs(target_logits, token))
                generated.append(int(token))
                counts.generated += 1
                counts.accepted += generated[-1] == draft_token
                yield token
                if finished is not None and finished.all():
                    return
                if generated[-1] != draft_token:
                    break


def _accept(
    logits: Tensor,
    draft_token: int | None,
    q: Tensor | None,
    config: GenerationConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token (1,): the draft token if it is accepted; q (1, V) are the probabilities of its draw, None: it was certain.

    With probability min(1, p(token) / q(token)) it is the draft token, else it is drawn from max(0, p - q), normalized; that is
    a draw from p (Leviathan et al. 2023, algorithm 1). Greedy decoding takes the likeliest whatever was guessed.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    p = logits.softmax(dim=-1)  # (1, V)
    if draft_token is None:
        return torch.multinomial(p, 1, generator=generator)[0]
    if q is None:
        q = torch.zeros_like(p)
        q[0, draft_token] = 1.0
    draw = torch.rand((), generator=generator, device=p.device)
    if draw * q[0, draft_token] < p[0, draft_token]:
        return torch.tensor([draft_token], device=p.device)
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)  # p and q alike but for rounding
    return torch.multinomial(rest, 1, generator=generator)[0]
