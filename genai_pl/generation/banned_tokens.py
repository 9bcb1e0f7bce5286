"""Which tokens must not come next: what excludes tokens by what stands in a row already."""

from collections.abc import Sequence

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation.output_constraints import OutputConstraints

TokenIds = Sequence[int]


class BannedTokens:
    """The exclusions of a batch; `mask` depends on what a row has generated and on nothing that happened before."""

    def __init__(
        self, config: GenerationConfig, constraints: OutputConstraints, prompts: Sequence[TokenIds], vocab_size: int
    ) -> None:
        self.ngram, self.min_new_tokens = config.no_repeat_ngram_size, config.min_new_tokens
        self.constraints, self.prompts, self.vocab_size = constraints, prompts, vocab_size
        self.ends = sorted(constraints.ends)
        if constraints.constraint is not None:
            constraints.constraint.begin(vocab_size)

    def mask(self, generated: Sequence[TokenIds | None], device: torch.device, *, strict: bool = True) -> Tensor:
        """Which tokens (N, V) must not follow the N rows generated so far; None is a row that is finished.

        There are as many rows of each prompt, next to each other. If `strict`, ConfigError where no token is left.
        """
        each = len(generated) // len(self.prompts)
        masks = torch.zeros(len(generated), self.vocab_size, dtype=torch.bool)
        for n, row in enumerate(generated):
            if row is not None:
                self._ban(masks[n], self.prompts[n // each], row)
        if strict and masks.all(dim=1).any():
            raise ConfigError(
                "generation: no token may come next: loosen the constraint, bad_words, no_repeat_ngram_size or min_new_tokens"
            )
        return masks.to(device)

    def _ban(self, mask: Tensor, prompt: TokenIds, generated: TokenIds) -> None:
        prefix = self.constraints.prefix
        if len(generated) < len(prefix):  # the prefix is the user's own: no other rule speaks about it
            mask.fill_(True)
            mask[prefix[len(generated)]] = False
            return
        row = [*prompt, *generated]
        if self.ngram is not None:
            mask[_completions_of_ngrams(row, self.ngram)] = True
        for word in self.constraints.bad_words:
            if _ends_with(row, word[:-1]):
                mask[word[-1]] = True
        if len(generated) < self.min_new_tokens:
            mask[self.ends] = True
        if self.constraints.constraint is not None:
            mask |= ~self.constraints.constraint.allowed(generated[len(prefix) :])


def build_banned_tokens(
    config: GenerationConfig,
    constraints: OutputConstraints,
    input_ids: Tensor,
    segment_ids: Tensor | None,
    vocab_size: int,
) -> BannedTokens | None:
    """The rules for prompts (B, T), padding left out; None where no option excludes anything."""
    settings = (config.no_repeat_ngram_size, constraints.prefix, constraints.bad_words, constraints.constraint)
    if not any(settings) and not (config.min_new_tokens and constraints.ends):
        return None
    prompts = input_ids.tolist()
    if segment_ids is not None:
        first = (segment_ids > 0).int().argmax(dim=1).tolist()
        prompts = [prompt[n:] for prompt, n in zip(prompts, first, strict=True)]
    return BannedTokens(config, constraints, prompts, vocab_size)


def _completions_of_ngrams(row: TokenIds, n: int) -> list[int]:
    """The tokens with which the last n - 1 tokens would become an n-gram that the row has (Paulus et al. 2018, 2.5)."""
    last = row[len(row) - n + 1 :] if len(row) >= n else None
    return [] if last is None else [row[i + n - 1] for i in range(len(row) - n + 1) if row[i : i + n - 1] == last]


def _ends_with(row: TokenIds, tail: TokenIds) -> bool:
    return len(tail) <= len(row) and list(row[len(row) - len(tail) :]) == list(tail)
