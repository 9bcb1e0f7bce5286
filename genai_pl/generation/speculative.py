"""Speculative decoding: draft tokens are proposed cheaply, and one forward pass of the target verifies several of them.

Each step: a proposer appends up to `draft_tokens` tokens; the target computes logits for all of them at once; tokens are
accepted from the left until the first rejection, which is replaced by a token from the corrected distribution. The samples
have exactly the target's distribution, whatever the proposer is (Leviathan et al. 2023); only the speed depends on it.
"""

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
from genai_pl.generation.processors import draw_token, process, token_logprobs
from genai_pl.models import Decoder
from genai_pl.peft.adapter import RowWeights


class DraftProposer(Protocol):
    """Interface of a proposer: `PromptLookup` and `DraftModel` implement it."""

    def propose(self, text: list[int], n: int, generator: torch.Generator | None) -> tuple[list[int], Tensor | None]:
        """At most n draft tokens after `text`, and the probabilities (n, V) of their draws; None where the tokens are certain."""
        ...


class PromptLookup:
    """Proposer without a model: the tokens that followed the last occurrence of the text's own ending (Saxena 2023).

    ngram: the longest ending to search for; shorter ones are tried if it does not occur. Useful where the output copies from
    the prompt, as in summaries, edits and code.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram

    def propose(self, text: list[int], n: int, generator: torch.Generator | None) -> tuple[list[int], Tensor | None]:
        """The tokens after the latest earlier occurrence of the longest ending; none if no ending occurs earlier.

        >>> PromptLookup(2).propose([1, 2, 3, 9, 1, 2], 2, None)
        ([3, 9], None)
        """
        for size in range(min(self.ngram, len(text) - 1), 0, -1):
            tail = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == tail:
                    return text[start + size : start + size + n], None
        return [], None


class DraftModel:
    """Proposer that decodes with a smaller model of the same tokenizer, in evaluation mode.

    config: its temperature, top-k and so on apply to the draft too, which makes acceptance likelier. vocab_size: of the target.
    """

    def __init__(self, model: Decoder, config: GenerationConfig, *, n_tokens: int, vocab_size: int) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.state = PrefixReuseState(model, n_tokens)

    @torch.no_grad()
    def propose(self, text: list[int], n: int, generator: torch.Generator | None) -> tuple[list[int], Tensor | None]:
        """Draft tokens as the draft model alone would decode them; none if the text has an id that it does not know."""
        # embeddings of two models with one tokenizer may be rounded up to different sizes
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
            tokens.append(int(draw_token(probabilities[-1], generator)))
        return tokens, torch.cat(probabilities) if probabilities else None

    def _padded(self, probabilities: Tensor) -> Tensor:
        """Probabilities (1, V) over the target's vocabulary; ids that the draft model lacks have probability 0."""
        missing = self.vocab_size - probabilities.shape[1]
        return torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities


def build_proposer(config: GenerationConfig, draft: Decoder | None, *, n_tokens: int, vocab_size: int) -> DraftProposer:
    """The proposer that the options name, for one text of at most n_tokens; ConfigError if the draft model is unfit."""
    if config.prompt_lookup is not None:
        return PromptLookup(config.prompt_lookup)
    if draft is None:
        raise ConfigError(f"generation.draft={config.draft}: nothing is loaded here; give the model as draft=")
    if draft.config.shape is not Shape.decoder or not draft.config.writes:
        raise ConfigError(f"generation.draft={config.draft}: a draft is a decoder that writes text")
    return DraftModel(draft, config, n_tokens=n_tokens, vocab_size=vocab_size)


@dataclass
class Acceptance:
    """Counts: draft tokens `proposed` and `accepted`, tokens `generated` in `forward_passes` of the target.

    >>> print(Acceptance(proposed=8, accepted=6, generated=10, forward_passes=4))
    75% of 8 proposed tokens accepted, 2.50 tokens for each call of the model
    """

    proposed: int = 0
    accepted: int = 0
    generated: int = 0
    forward_passes: int = 0

    def __str__(self) -> str:
        share, each = self.accepted / max(1, self.proposed), self.generated / max(1, self.forward_passes)
        return f"{share:.0%} of {self.proposed} proposed tokens accepted, {each:.2f} tokens for each call of the model"


class TargetModel:
    """The model whose distribution the output has, with one prompt (ids), its adapter weights (1,) and the cache `state`.

    The cache survives from one continuation to the next, so the prompt is prefilled once for all samples.
    """

    def __init__(
        self,
        model: Decoder,
        prompt: Sequence[int],
        config: GenerationConfig,
        constraints: OutputConstraints = NO_CONSTRAINTS,
        row_weights: RowWeights | None = None,
    ) -> None:
        self.prompt, self.config = list(prompt), config
        self.state = PrefixReuseState(model, len(self.prompt) + config.max_new_tokens - 1, row_weights)
        self.input_ids = torch.tensor([self.prompt], device=self.state.device)
        check_prompt(model, self.input_ids, None)
        self.banned_tokens = build_banned_tokens(config, constraints, self.input_ids, None, model.config.vocab_size)

    def process(self, logits: Tensor, generated: list[int]) -> Tensor:
        """Processed logits (1, V) to sample from, given the model's own logits (1, V) and the tokens generated so far.

        Penalties and masks depend on the tokens before each position, so they are applied per draft token, not to all at once.
        """
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
    """Yields the tokens (1,) of one continuation, as `decode` does and with the same distribution.

    finished: (1,) bool that the caller sets to end the continuation. logprobs: a list, filled as by `decode`.
    acceptance: counts to be increased. generator: on the target's device.
    """
    config, state = target.config, target.state
    counts = Acceptance() if acceptance is None else acceptance
    generated: list[int] = []
    with evaluating(state.model):
        while len(generated) < config.max_new_tokens:
            # propose: never more than fit into the cache or than may still be generated, less the one the target adds
            text = target.prompt + generated
            n_draft = min(config.draft_tokens, config.max_new_tokens - len(generated) - 1, state.remaining(text))
            proposed, q = proposer.propose(text, n_draft, generator) if n_draft else ([], None)
            # verify: one forward pass gives logits after the text and after each draft token
            logits = state.forward(text + proposed, len(proposed) + 1)
            counts.proposed += len(proposed)
            counts.forward_passes += 1
            # accept from the left; the token after the last draft token comes for free
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
    """The next token (1,): the draft token, or a replacement for it (Leviathan et al. 2023, algorithm 1).

    With p the target's and q the draft's distribution, the draft token is accepted with probability min(1, p / q) and otherwise
    replaced by a draw from max(0, p - q), normalized; together that is a draw from p. Greedy decoding takes the argmax.

    logits: (1, V) of the target, processed. draft_token: None after the last one. q: (1, V), or None where the token was certain.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    p = logits.softmax(dim=-1)  # (1, V)
    # past the last draft token: an ordinary draw
    if draft_token is None:
        return draw_token(p, generator)
    if q is None:
        q = torch.zeros_like(p)
        q[0, draft_token] = 1.0
    draw = torch.rand((), generator=generator, device=p.device)
    if draw * q[0, draft_token] < p[0, draft_token]:
        return torch.tensor([draft_token], device=p.device)
    # rejected: the remaining probability of the target
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum() > 0, rest, p)  # p and q alike but for rounding
    return draw_token(rest, generator)
