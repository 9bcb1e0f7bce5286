"""Hard negatives: candidates that a model of embeddings finds near an anchor though they are none of its positives.

Near candidates are often positives that nobody labelled, so a margin below the score of the anchor's own positive leaves
them out (Moreira et al. 2024, NV-Retriever, TopK-PercPos: relative_margin=0.05).
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # anchors whose similarities to all candidates exist at once
NONE = float("-inf")


class MiningOptions(NamedTuple):
    """Which of the nearest candidates are negatives, under sentence-transformers' names.

    n: negatives of an anchor. range_min, range_max: ranks among the candidates that remain; range_max=None looks at ten times n
    where a score may exclude some. min_score, max_score: cosines. absolute_margin, relative_margin: a negative's cosine is at
    most p - absolute_margin and p - relative_margin |p|, where p is that of the anchor's least similar positive.
    positive_max_rank: rank of that positive at most, from 1; an anchor whose positive is farther gets no negatives. A reranker
    of the K nearest never meets it, and is to learn from what this search finds (Gao, Dai and Callan 2021).
    sampling: top (the nearest) or random (of all that remain).
    """

    n: int = 3
    range_min: int = 0
    range_max: int | None = None
    min_score: float | None = None
    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    positive_max_rank: int | None = None
    sampling: str = "top"

    def depth(self, most_positives: int) -> int:
        """Ranks to look at, where no anchor has more than `most_positives` positives."""
        if self.range_max is not None:
            return self.range_max
        excludes = (self.absolute_margin, self.relative_margin, self.max_score) != (None, None, None)
        return self.range_min + self.n * (10 if excludes else 1) + most_positives


class Mined(NamedTuple):
    """Negatives of Q anchors, the nearest first, and what was left out.

    scores, indices: (Q, n) cosines and numbers of candidates; -inf and -1 where an anchor has fewer. positives: (Q,) the
    cosine of the least similar positive. excluded: candidates among those looked at that a margin or a score left out.
    too_far: anchors whose positive positive_max_rank left out.
    """

    scores: Tensor
    indices: Tensor
    positives: Tensor
    excluded: int
    too_far: int = 0


def mine_negatives(
    anchors: Tensor,
    candidates: Tensor,
    positives: Sequence[Sequence[int]],
    options: MiningOptions,
    *,
    same_text: Sequence[int | None] | None = None,
    seed: int = 0,
) -> Mined:
    """The hard negatives of anchors (Q, D) among candidates (N, D).

    positives: numbers of each anchor's positive candidates, at least one. same_text: the candidate that is the anchor's own
    text, or None; it is no negative. seed: of the random sampling.
    """
    most = max(map(len, positives))
    depth = options.depth(most)
    anchors, candidates = F.normalize(anchors, dim=-1), F.normalize(candidates, dim=-1)
    same_text = [None] * len(positives) if same_text is None else same_text
    generator = random.Random(seed)
    parts = []
    for start in range(0, len(anchors), CHUNK):
        rows = slice(start, start + CHUNK)
        similarity = anchors[rows] @ candidates.T  # (q, N)
        known = positives[rows]
        # the least similar positive, by which the margins are measured
        least = torch.stack([similarity[n, list(own)].min() for n, own in enumerate(known)])
        # the nearest, without positives and the text itself
        scores, indices = similarity.topk(min(depth + most, similarity.shape[1]), dim=1)
        nearer = (similarity > least[:, None]).sum(1)  # than the positive
        for n, (own, same) in enumerate(zip(known, same_text[rows], strict=True)):
            own = own if same is None else [*own, same]
            scores[n, torch.isin(indices[n], torch.tensor(own, device=indices.device))] = NONE
            nearer[n] -= (similarity[n, list({*own})] > least[n]).sum()
        n_before = scores.isfinite().sum()
        scores = _within(scores, least[:, None], options)
        excluded = int(n_before - scores.isfinite().sum())
        far = torch.zeros_like(nearer, dtype=torch.bool)
        if options.positive_max_rank is not None:
            far = nearer >= options.positive_max_rank
            scores = scores.masked_fill(far[:, None], NONE)
        # ranks among those that remain
        scores, order = scores.topk(min(depth, scores.shape[1]), dim=1)
        indices = indices.gather(1, order)[:, options.range_min :]
        chosen = _choose(scores[:, options.range_min :], indices, options, generator)
        parts.append((*chosen, least, excluded, int(far.sum())))
    scores, indices, least, counts, too_far = zip(*parts, strict=True)
    return Mined(torch.cat(scores), torch.cat(indices), torch.cat(least), sum(counts), sum(too_far))


def _within(scores: Tensor, positive: Tensor, options: MiningOptions) -> Tensor:
    """The scores (q, k), -inf where a margin below the positive's score (q, 1) or a bound excludes a candidate."""
    if options.absolute_margin is not None:
        scores = scores.masked_fill(scores + options.absolute_margin > positive, NONE)
    if options.relative_margin is not None:
        scores = scores.masked_fill(scores > positive - positive.abs() * options.relative_margin, NONE)
    if options.max_score is not None:
        scores = scores.masked_fill(scores > options.max_score, NONE)
    if options.min_score is not None:
        scores = scores.masked_fill(scores < options.min_score, NONE)
    return scores


def _choose(scores: Tensor, indices: Tensor, options: MiningOptions, generator: random.Random) -> tuple[Tensor, Tensor]:
    """Scores and numbers (q, n) of the candidates that become negatives, of the remaining ones (q, k), best first."""
    missing = options.n - scores.shape[1]
    if missing > 0:
        scores, indices = F.pad(scores, (0, missing), value=NONE), F.pad(indices, (0, missing), value=-1)
    if options.sampling == "random":
        counts = scores.isfinite().sum(1).clamp(min=options.n).tolist()
        drawn = [sorted(generator.sample(range(count), options.n)) for count in counts]
        chosen = torch.tensor(drawn, device=scores.device)
        scores, indices = scores.gather(1, chosen), indices.gather(1, chosen)
    scores, indices = scores[:, : options.n], indices[:, : options.n]
    return scores, indices.masked_fill(scores == NONE, -1)
