"""Banned tokens: a mask, per row, of tokens that must not come next.

Five rules ban tokens: the prefix, no_repeat_ngram_size, bad_words, min_new_tokens and the grammar. Each reads the row's ids,
so they run on the CPU, in Python, over lists; the mask goes to the device once per step. `processors.py` applies it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation.output_constraints import OutputConstraints

TokenIds = Sequence[int]


class BannedTokens:
    """The rules of a batch of prompts. `mask` depends on the generated ids alone, not on earlier calls.

    So rows may be reordered (beams), rejected (speculation) and dropped (serving) freely. config: no_repeat_ngram_size and
    min_new_tokens. constraints: end tokens, prefix, bad words, grammar. prompts: ids without padding, in which n-grams and bad
    words may begin. vocab_size: V, the width of the logits.
    """

    def __init__(
        self, config: GenerationConfig, constraints: OutputConstraints, prompts: Sequence[TokenIds], vocab_size: int
    ) -> None:
        self.ngram, self.min_new_tokens = config.no_repeat_ngram_size, config.min_new_tokens
        self.constraints, self.prompts, self.vocab_size = constraints, prompts, vocab_size
        self.ends = sorted(constraints.ends)
        if constraints.constraint is not None:
            constraints.constraint.begin(vocab_size)

    def mask(self, generated: Sequence[TokenIds | None], device: torch.device, *, strict: bool = True) -> Tensor:
        """Mask (N, V), True for tokens that must not follow, on `device`.

        generated: ids of each of the N rows so far, those of one prompt next to each other; None for a finished row.
        strict: ConfigError where a row is left without any token. Beam search passes False: such a beam only loses.
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
        """Set `mask` (V,) for one row, in place."""
        prefix = self.constraints.prefix
        if len(generated) < len(prefix):  # the prefix is the user's choice: other rules do not apply to it
            mask.fill_(True)
            mask[prefix[len(generated)]] = False
            return
        # each rule adds to the mask, so their order makes no difference
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
    """The rules for prompts (B, T) with segment_ids 0 on padding; None if no option bans anything, which saves the CPU work."""
    settings = (config.no_repeat_ngram_size, constraints.prefix, constraints.bad_words, constraints.constraint)
    if not any(settings) and not (config.min_new_tokens and constraints.ends):
        return None
    prompts = input_ids.tolist()
    if segment_ids is not None:
        first = (segment_ids > 0).int().argmax(dim=1).tolist()
        prompts = [prompt[n:] for prompt, n in zip(prompts, first, strict=True)]
    return BannedTokens(config, constraints, prompts, vocab_size)


def _completions_of_ngrams(row: TokenIds, n: int) -> list[int]:
    """Tokens that would repeat an n-gram of the row after its last n - 1 tokens (Paulus et al. 2018, section 2.5).

    >>> _completions_of_ngrams([1, 2, 3, 1, 2], 3)
    [3]
    """
    last = row[len(row) - n + 1 :] if len(row) >= n else None
    return [] if last is None else [row[i + n - 1] for i in range(len(row) - n + 1) if row[i : i + n - 1] == last]


def _ends_with(row: TokenIds, tail: TokenIds) -> bool:
    """True if the row ends with `tail`; an empty tail ends every row, so a bad word of one token is always banned."""
    return len(tail) <= len(row) and list(row[len(row) - len(tail) :]) == list(tail)
