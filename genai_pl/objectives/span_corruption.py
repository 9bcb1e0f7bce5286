"""Span corruption: sentinels replace spans, and a decoder produces these (Raffel et al. 2020, 3.1.4; T5's code)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from genai_pl.errors import ConfigError
from genai_pl.objectives.collate import Batch, Collator, Example, missing_token_error, pad_rows, row_rng
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_loss import IGNORED


class Denoiser(NamedTuple):
    """The share of a row that is hidden, and the mean length of its spans.

    noise_density: share of tokens that are hidden. mean_span_length: None hides the end of the row as one span, the
    sequential denoiser of UL2, whose others are the same with other numbers (Tay et al. 2022, table 1).
    """

    noise_density: float = 0.15
    mean_span_length: float | None = 3.0

    def counts(self, n_tokens: int) -> tuple[int, int]:
        """The number of hidden tokens and of spans among n_tokens."""
        hidden = min(max(round(n_tokens * self.noise_density), 1), max(n_tokens - 1, 1))
        if self.mean_span_length is None:
            return hidden, 1
        spans = max(round(hidden / self.mean_span_length), 1)
        return hidden, min(spans, max(n_tokens - hidden, 1))  # a span needs a token before it

    def lengths(self, n_tokens: int) -> tuple[int, int]:
        """Lengths of input and target of n_tokens: a sentinel per span and an end token are in both."""
        hidden, spans = self.counts(n_tokens)
        return n_tokens - hidden + spans + 1, hidden + spans + 1

    def tokens_length(self, inputs_length: int) -> int:
        """The most tokens whose input is not longer than inputs_length."""
        n_tokens = 1
        while self.lengths(n_tokens + 1)[0] <= inputs_length:
            n_tokens += 1
        return n_tokens


class SpanCorruptionCollator(Collator):
    """input_ids (B, S) with a sentinel per hidden span; decoder_input_ids and labels (B, T): sentinel, span, ..., end.

    noise_density, mean_span_length: of the denoiser. mixture: draw one of several denoisers for each row instead.

    A row is one text, end tokens of documents included, so segment_ids and decoder_segment_ids mark padding only. Full rows
    need none: they have the length whose input is seq_len. With a mixture, rows are as long as the denoiser that hides the
    least allows, and the inputs of the others are padded.
    """

    def __init__(
        self,
        *,
        vocabulary: SpecialTokens,
        seed: int,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        mixture: Sequence[Mapping[str, float | None]] | None = None,
    ) -> None:
        if not vocabulary.sentinels:
            raise missing_token_error("span_corruption", "sentinels (<extra_id_0>, ...)")
        if vocabulary.end is None:
            raise missing_token_error("span_corruption", "an end-of-text token")
        plain = {"noise_density": noise_density, "mean_span_length": mean_span_length}
        self.vocabulary, self.seed = vocabulary, seed
        self.denoisers = [_denoiser(options) for options in mixture or [plain]]

    def row_length(self, seq_len: int) -> int:
        """The tokens of a row whose input has seq_len; ConfigError if it has more spans than the tokenizer has sentinels."""
        n_tokens = min(denoiser.tokens_length(seq_len) for denoiser in self.denoisers)
        for denoiser in self.denoisers:
            self._sentinels(denoiser.counts(n_tokens)[1], n_tokens)
        return n_tokens

    def __call__(self, rows: Sequence[Example]) -> Batch:
        pairs = [self._corrupt(row) for row in rows]
        inputs, targets = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        pad, start = self.vocabulary.pad, self.vocabulary.first
        labels = pad_rows(targets, IGNORED)
        segments = pad_rows([np.ones_like(ids) for ids in inputs], 0)
        decoder_segments = pad_rows([np.ones_like(ids) for ids in targets], 0)
        batch = {
            "input_ids": pad_rows(inputs, pad),
            "decoder_input_ids": pad_rows([np.append(start, ids[:-1]) for ids in targets], pad),
            "labels": labels,
            "targets": (labels != IGNORED).sum().float(),
        }
        if segments.all() and decoder_segments.all():
            return batch
        return {**batch, "segment_ids": segments, "decoder_segment_ids": decoder_segments}

    def _corrupt(self, row: Example) -> tuple[np.ndarray, np.ndarray]:
        """Input and target of a row: kept and hidden runs alternate, a kept one first."""
        rng = row_rng(self.seed, row)
        denoiser = self.denoisers[rng.integers(len(self.denoisers))]
        ids = row["input_ids"].astype(np.int64)
        n_hidden, n_spans = denoiser.counts(len(ids))
        sentinels = self._sentinels(n_spans, len(ids))
        hidden, kept = _split(n_hidden, n_spans, rng), _split(len(ids) - n_hidden, n_spans, rng)
        is_hidden = np.repeat(np.tile([False, True], n_spans), np.stack([kept, hidden], 1).ravel())
        inputs = np.insert(ids[~is_hidden], np.cumsum(kept), sentinels)
        targets = np.insert(ids[is_hidden], np.cumsum(hidden) - hidden, sentinels)
        end = self.vocabulary.end
        return np.append(inputs, end), np.append(targets, end)

    def _sentinels(self, n_spans: int, n_tokens: int) -> np.ndarray:
        available = self.vocabulary.sentinels
        if n_spans > len(available):
            raise ConfigError(
                f"objective=span_corruption: rows of {n_tokens} tokens have {n_spans} spans, but the tokenizer has "
                f"{len(available)} sentinels; lower model.max_seq_len or objective.noise_density, or raise "
                "objective.mean_span_length"
            )
        return np.array(available[:n_spans])


def _denoiser(options: Mapping[str, float | None]) -> Denoiser:
    unknown = set(options) - set(Denoiser._fields)
    if unknown:
        raise ConfigError(f"objective.mixture: {min(unknown)} is not one of {', '.join(Denoiser._fields)}")
    denoiser = Denoiser(**options)
    if not 0 < denoiser.noise_density < 1:
        raise ConfigError(f"objective.noise_density must lie between 0 and 1, not {denoiser.noise_density}")
    if denoiser.mean_span_length is not None and denoiser.mean_span_length < 1:
        raise ConfigError(f"objective.mean_span_length must be at least 1, not {denoiser.mean_span_length}")
    return denoiser


def _split(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `parts` runs of at least one token that sum to `total`; all such divisions are equally likely."""
    if parts == 1:
        return np.array([total])
    borders = 1 + np.sort(rng.choice(total - 1, parts - 1, replace=False, shuffle=False))
    return np.diff(borders, prepend=0, append=total)
