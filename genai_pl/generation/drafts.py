"""Where proposed tokens come from: a smaller model, or the text itself."""

from typing import Protocol

import torch
from torch import Tensor

from genai_pl.errors import ConfigError
from genai_pl.generation.context import Follower
from genai_pl.generation.processors import process
from genai_pl.models import Decoder
from genai_pl.names import Shape
from genai_pl.specs import GenerationConfig


class Proposer(Protocol):
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
        self.follower = Follower(model, n_tokens)

    @torch.no_grad()
    def propose(self, text: list[int], n: int, generator: torch.Generator | None) -> tuple[list[int], Tensor | None]:
        """Tokens that the draft writes, as it would alone; none after a token that it does not know."""
        if max(text) >= self.follower.model.config.vocab_size:
            return [], None
        tokens: list[int] = []
        drawn = []
        for _ in range(min(n, 1 + self.follower.room(text))):
            logits = process(self.follower.read([*text, *tokens], 1)[:, : self.vocab_size], self.config)
            if self.config.temperature == 0:
                tokens.append(int(logits.argmax()))
                continue
            drawn.append(self._padded(logits.softmax(dim=-1)))
            tokens.append(int(torch.multinomial(drawn[-1], 1, generator=generator)))
        return tokens, torch.cat(drawn) if drawn else None

    def _padded(self, probabilities: Tensor) -> Tensor:
        """(1, V) of the model's vocabulary: the draft's may be rounded up less."""
        missing = self.vocab_size - probabilities.shape[1]
        return torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities


def build_proposer(config: GenerationConfig, draft: Decoder | None, *, n_tokens: int, vocab_size: int) -> Proposer:
    """What the options ask for, for one text of at most n_tokens."""
    if config.prompt_lookup is not None:
        return PromptLookup(config.prompt_lookup)
    if draft is None:
        raise ConfigError(f"generation.draft={config.draft}: nothing is loaded here; give the model as draft=")
    if draft.config.shape is not Shape.decoder or not draft.config.writes:
        raise ConfigError(f"generation.draft={config.draft}: a draft is a decoder that writes text")
    return DraftModel(draft, config, n_tokens=n_tokens, vocab_size=vocab_size)
