"""Which tokens must not come next: what excludes tokens by what stands in a row already."""

from collections.abc import Sequence

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation.output_constraints import Limits

Row = Sequence[int]


class Rules:
    """The exclusions of a batch; `excluded` depends on what a row has written and on nothing that happened before."""

    def __init__(self, config: GenerationConfig, limits: Limits, prompts: Sequence[Row], vocab_size: int) -> None:
        self.ngram, self.min_new_tokens = config.no_repeat_ngram_size, config.min_new_tokens
        self.limits, self.prompts, self.vocab_size = limits, prompts, vocab_size
        self.ends = sorted(limits.ends)
        if limits.constraint is not None:
            limits.constraint.begin(vocab_size)

    def excluded(self, written: Sequence[Row | None], device: torch.device, *, strict: bool = True) -> Tensor:
        """Which tokens (N, V) must not follow the N rows written so far; None is a row that is finished.

        There are as many rows of each prompt, next to each other. If `strict`, ConfigError where no token is left.
        """
        each = len(written) // len(self.prompts)
        masks = torch.zeros(len(written), self.vocab_size, dtype=torch.bool)
        for n, row in enumerate(written):
            if row is not None:
                self._exclude(masks[n], self.prompts[n // each], row)
        if strict and masks.all(dim=1).any():
            raise ConfigError(
                "generation: no token may come next: loosen the constraint, bad_words, no_repeat_ngram_size or min_new_tokens"
            )
        return masks.to(device)

    def _exclude(self, mask: Tensor, prompt: Row, written: Row) -> None:
        prefix = self.limits.prefix
        if len(written) < len(prefix):  # the prefix is the user's own: no other rule speaks about it
            mask.fill_(True)
            mask[prefix[len(written)]] = False
            return
        row = [*prompt, *written]
        if self.ngram is not None:
            mask[_completions_of_ngrams(row, self.ngram)] = True
        for word in self.limits.bad_words:
            if _ends_with(row, word[:-1]):
                mask[word[-1]] = True
        if len(written) < self.min_new_tokens:
            mask[self.ends] = True
        if self.limits.constraint is not None:
            mask |= ~self.limits.constraint.allowed(written[len(prefix) :])


def build_rules(
    config: GenerationConfig, limits: Limits, input_ids: Tensor, segment_ids: Tensor | None, vocab_size: int
) -> Rules | None:
    """The rules for prompts (B, T), padding left out; None where no option excludes anything."""
    asked = (config.no_repeat_ngram_size, limits.prefix, limits.bad_words, limits.constraint)
    if not any(asked) and not (config.min_new_tokens and limits.ends):
        return None
    prompts = input_ids.tolist()
    if segment_ids is not None:
        first = (segment_ids > 0).int().argmax(dim=1).tolist()
        prompts = [prompt[n:] for prompt, n in zip(prompts, first, strict=True)]
    return Rules(config, limits, prompts, vocab_size)


def _completions_of_ngrams(row: Row, n: int) -> list[int]:
    """The tokens with which the last n - 1 tokens would become an n-gram that the row has (Paulus et al. 2018, 2.5)."""
    last = row[len(row) - n + 1 :] if len(row) >= n else None
    return [] if last is None else [row[i + n - 1] for i in range(len(row) - n + 1) if row[i : i + n - 1] == last]


def _ends_with(row: Row, tail: Row) -> bool:
    return len(tail) <= len(row) and list(row[len(row) - len(tail) :]) == list(tail)
