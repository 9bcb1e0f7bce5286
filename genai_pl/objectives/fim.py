"""Fill in the middle: documents rearranged so that next-token prediction learns to insert (Bavarian et al. 2022, 3)."""

from collections.abc import Sequence

import numpy as np

from genai_pl.errors import ConfigError
from genai_pl.objectives.clm import next_token_batch
from genai_pl.objectives.collate import Batch, Collator, Example, missing_token_error, row_rng
from genai_pl.objectives.special_tokens import SpecialTokens

N_SENTINELS = 3
SHORTEST = 4  # tokens of a document that is worth rearranging


class FimCollator(Collator):
    """A causal batch in which each document of a row is, with probability fim_rate, divided in three and rearranged.

    fim_rate: share of documents that are rearranged, to prefix, suffix, middle (PSM); spm_rate: share of these that begin
    with the suffix (SPM). A document's end token stays last.

    The documents are those of the packed row ("context-level FIM" of the paper), so none is divided between rows after its
    rearrangement. A rearranged document is three tokens longer, by which the end of the row is truncated.
    """

    overlap = 1

    def __init__(self, *, vocabulary: SpecialTokens, seed: int, fim_rate: float = 0.5, spm_rate: float = 0.5) -> None:
        if vocabulary.fim is None:
            raise missing_token_error("fim", "prefix, middle and suffix tokens (<|fim_prefix|>, ...)")
        for name, rate in (("fim_rate", fim_rate), ("spm_rate", spm_rate)):
            if not 0 <= rate <= 1:
                raise ConfigError(f"objective.{name} is a probability, not {rate}")
        self.vocabulary, self.seed = vocabulary, seed
        self.fim_rate, self.spm_rate = fim_rate, spm_rate

    def __call__(self, rows: Sequence[Example]) -> Batch:
        rearranged = [self._rearrange(row) for row in rows]
        ids = [np.concatenate(documents) for documents in rearranged]
        segments = [np.repeat(np.arange(len(row)) + 1, [len(d) for d in row]) for row in rearranged]
        return next_token_batch(ids, segments, pad=self.vocabulary.pad)

    def _rearrange(self, row: Example) -> list[np.ndarray]:
        """The row's documents, some of them rearranged, in as many tokens as before."""
        rng = row_rng(self.seed, row)
        ids, borders = row["input_ids"].astype(np.int64), np.flatnonzero(np.diff(row["segment_ids"])) + 1
        remaining, documents = len(ids), []
        for document in np.split(ids, borders):
            if remaining == 0:
                break
            fits = min(len(document), remaining - N_SENTINELS) >= SHORTEST
            if rng.random() < self.fim_rate and fits:
                document = self._transform(document[: remaining - N_SENTINELS], rng)
            documents.append(document[:remaining])
            remaining -= len(documents[-1])
        return documents

    def _transform(self, document: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The document with its middle last; both splits fall between any two tokens with equal probability."""
        PREFIX, MIDDLE, SUFFIX = ([token] for token in self.vocabulary.fim)
        ended = document[-1] == self.vocabulary.end
        body, end = (document[:-1], document[-1:]) if ended else (document, document[:0])
        prefix, middle, suffix = np.split(body, np.sort(rng.integers(0, len(body), size=2, endpoint=True)))
        if rng.random() < self.spm_rate:
            return np.concatenate([PREFIX, SUFFIX, suffix, MIDDLE, prefix, middle, end])
        return np.concatenate([PREFIX, prefix, SUFFIX, suffix, MIDDLE, middle, end])
