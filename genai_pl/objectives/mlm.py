"""Masked language modelling: hidden tokens are predicted from both sides (Devlin et al. 2019, 3.1)."""

from collections.abc import Sequence

import numpy as np

from genai_pl.errors import ConfigError
from genai_pl.objectives.collate import Batch, Collator, Example, missing_token_error, pad_rows, row_rng, with_segments
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class MaskedLMCollator(Collator):
    """input_ids (B, T) with noise, labels (B, T) at the targets; the noise is new in every epoch (Liu et al. 2019, 4.1).

    mask_probability: share of a row's text tokens that are targets, rounded, at least one; special tokens never are.
    whole_word: all tokens of a word are targets or none; their number then varies by half a word.
    replace_with_mask, replace_with_random: shares of the targets that become the mask or a random token; the rest stay.
    """

    def __init__(
        self,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        mask_probability: float = 0.15,
        whole_word: bool = False,
        replace_with_mask: float = 0.8,
        replace_with_random: float = 0.1,
    ) -> None:
        if vocabulary.mask is None:
            raise missing_token_error("mlm", "a mask token")
        if whole_word and not vocabulary.starts_word.any():
            raise ConfigError("objective.whole_word: no token of the tokenizer begins a word; set it to false")
        if not 0 < mask_probability <= 1:
            raise ConfigError(f"objective.mask_probability must lie in (0, 1], not {mask_probability}")
        if min(replace_with_mask, replace_with_random) < 0 or replace_with_mask + replace_with_random > 1:
            raise ConfigError(
                f"objective.replace_with_mask ({replace_with_mask}) and replace_with_random ({replace_with_random}) "
                "are shares of the chosen tokens: at least 0 each and at most 1 together"
            )
        self.vocabulary, self.seed = vocabulary, seed
        self.mask_probability, self.whole_word = mask_probability, whole_word
        self.replace_with_mask, self.replace_with_random = replace_with_mask, replace_with_random
        self.text_tokens = np.flatnonzero(~vocabulary.special)  # what a random replacement may be

    def __call__(self, rows: Sequence[Example]) -> Batch:
        noised = [self._noise(row) for row in rows]
        labels = pad_rows([labels for _, labels in noised], IGNORED)
        batch = {
            "input_ids": pad_rows([ids for ids, _ in noised], self.vocabulary.pad),
            "labels": labels,
            "targets": (labels != IGNORED).sum().float(),
        }
        return with_segments(batch, pad_rows([row["segment_ids"] for row in rows], 0))

    def _noise(self, row: Example) -> tuple[np.ndarray, np.ndarray]:
        """Noised ids and labels (n,) of a row."""
        rng = row_rng(self.seed, row)
        original = row["input_ids"]
        targets = self._choose(original, row["segment_ids"], rng)  # (n,) positions
        draw = rng.random(len(targets))
        masked = targets[draw < self.replace_with_mask]
        random = targets[(draw >= self.replace_with_mask) & (draw < self.replace_with_mask + self.replace_with_random)]
        ids, labels = original.copy(), np.full(len(original), IGNORED)
        labels[targets] = original[targets]
        ids[masked] = self.vocabulary.mask
        ids[random] = rng.choice(self.text_tokens, len(random))
        return ids, labels

    def _choose(self, ids: np.ndarray, segments: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Positions of the targets: words in random order, up to the one whose middle passes the share of tokens."""
        text = np.flatnonzero(~self.vocabulary.special[ids])
        if len(text) == 0:
            return text
        word = self._words(ids, segments, text)
        sizes = np.bincount(word)
        order = rng.permutation(len(sizes))
        is_target_rank = np.cumsum(sizes[order]) - sizes[order] / 2 <= self.mask_probability * len(text)
        is_target_rank[0] = True
        is_target_word = np.zeros(len(sizes), bool)
        is_target_word[order[is_target_rank]] = True
        return text[is_target_word[word]]

    def _words(self, ids: np.ndarray, segments: np.ndarray, text: np.ndarray) -> np.ndarray:
        """The number of the word that each text token belongs to."""
        if not self.whole_word:
            return np.arange(len(text))
        starts = self.vocabulary.starts_word[ids[text]].copy()
        # a special token or the border of a document ends a word as well
        starts[1:] |= (np.diff(text) > 1) | (np.diff(segments[text]) != 0)
        starts[0] = True
        return np.cumsum(starts) - 1
