"""Labels of a request: texts, or pairs of texts, to the probabilities of a head for labels, slice by slice as embeddings."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from genai_pl.config.labels import REGRESSION
from genai_pl.data.text_tokens import encode_pairs
from genai_pl.evaluation.labels import probabilities
from genai_pl.serving.embeddings import TextScorer
from genai_pl.serving.engine.scoring import label_slices
from genai_pl.serving.errors import ApiError

if TYPE_CHECKING:
    from genai_pl.serving.service import Service


class TextLabeller(TextScorer):
    """Probabilities of labels by one service's model, within the limit of tokens of a request."""

    def __init__(self, service: "Service") -> None:
        super().__init__(service)
        self.labels = service.labels

    async def classify(
        self, items: Sequence[str | Sequence[int]], pairs: Sequence[str] | None, adapter: str | None = None
    ) -> tuple[Tensor, int]:
        """(probabilities (N, K), tokens read) of N texts or lists of token ids.

        pairs: second texts. Raises ApiError: 400 for a model without labels of texts, 422 for too many tokens.
        """
        if self.labels is None:
            gives = "rewards, at /score" if self.service.is_reward else "no labels of texts"
            raise ApiError(400, f"{self.service.name} gives {gives}: /classify is for models of objective=classify")
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) not in (0, len(items)):
            raise ApiError(422, "input: give texts or token ids, not both", param="input")
        if texts and pairs is None and self.labels.pairs:
            raise ApiError(
                422, f"text_pair: {self.service.name} reads pairs of texts, give the second ones", param="text_pair"
            )
        if not texts:
            rows = {"input_ids": [list(self.service.check_token_ids(item, "input")) for item in items]}
            self._check_tokens(rows["input_ids"], "input")
        else:
            rows = await self._encode_rows(texts, pairs, "input")
        self._check_rows(rows["input_ids"])
        logits = await self._run_slices(label_slices(self.model, rows), adapter)
        return probabilities(logits, self.labels), sum(map(len, rows["input_ids"]))

    async def relevance(
        self, queries: Sequence[str], documents: Sequence[str], adapter: str | None = None
    ) -> tuple[Tensor, int]:
        """(relevance (N,) of N documents, each to its query, tokens read); ApiError 400 for a model that has none."""
        labels = self.labels
        if labels is None or len(labels.names) != 1 or (labels.problem_type == REGRESSION and not labels.pairs):
            problem = (
                f"{self.service.name} gives no relevance: /rerank and /v1/score are for models of objective=rerank"
            )
            other = "; texts after a prompt have scores at /score" if labels is None else ""
            raise ApiError(400, problem + other)
        scores, n_tokens = await self.classify(queries, documents, adapter)
        return scores[:, 0], n_tokens

    async def _encode_rows(
        self, texts: Sequence[str], pairs: Sequence[str] | None, param: str
    ) -> dict[str, list[list[int]]]:
        """Tokens of texts or pairs, tokenized group by group, so that a request that is too long is refused early."""
        sizes = [len(text) + (0 if pairs is None else len(pairs[n])) for n, text in enumerate(texts)]
        rows: dict[str, list[list[int]]] = {"input_ids": []}
        for group in self._encode_groups(sizes, param):
            second = None if pairs is None else pairs[group]
            for name, part in (
                await self._encode(partial(encode_pairs, max_length=None), texts[group], second)
            ).items():
                rows.setdefault(name, []).extend(part)
            self._check_tokens(rows["input_ids"], param)
        return rows
