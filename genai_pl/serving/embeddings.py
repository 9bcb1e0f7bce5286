"""Embeddings and scores of a request: texts to token rows group by group, token rows through the model slice by slice.

Neither step may hold others for long: a request has up to max_input_tokens tokens in up to max_inputs texts. So texts are
tokenized in groups of about SHORT characters with the token limit checked after each group, and the rows become slices of
engine/scoring.py, between which other requests use the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from genai_pl.data.prompt_tokens import Messages
from genai_pl.data.text_tokens import encode_texts
from genai_pl.evaluation.embeddings import encode_sentences, logprob_windows
from genai_pl.evaluation.preferences import reward_tokens
from genai_pl.evaluation.windows import ScoredWindow
from genai_pl.models.onnx.model import is_onnx
from genai_pl.serving.engine.scoring import embedding_slices, logprob_slices, reward_slices
from genai_pl.serving.engine.scoring_queue import Slices
from genai_pl.serving.errors import ApiError
from genai_pl.serving.tokenize_threads import SHORT

if TYPE_CHECKING:
    from genai_pl.serving.service import Service

T = TypeVar("T")
CHARACTERS = 8  # that a request may have per token of its limit, checked before tokenizing: English has 4 to 5
TURN = 16  # characters that a chat template adds to a turn, roughly
Scored = list[tuple[float, int]]


class TextScorer:
    """Embeddings and scores by one service's model, within the limit of tokens of a request.

    service: model, tokenizer, adapters and queues; what it can do depends on its head and shape
    """

    def __init__(self, service: "Service") -> None:
        self.service, self.model, self.limit = service, service.model, service.limits.max_input_tokens

    async def embed(
        self, inputs: Sequence[str | Sequence[int]], adapter: str | None = None
    ) -> tuple[torch.Tensor, int]:
        """(embeddings (N, D), tokens read) of N texts or lists of token ids, by the base or an adapter.

        Raises ApiError: 400 for a model without embeddings or a text beyond its context, 422 for too many tokens.
        """
        if self.service.is_reward:
            raise ApiError(400, f"{self.service.name} is a reward model: it gives scores at /score")
        if self.service.labels is not None:
            raise ApiError(400, f"{self.service.name} is a classifier: it gives labels at /classify")
        self._check_one_stack("embeddings")
        # token ids are taken as they are
        rows: list[Sequence[int]] = [
            [] if isinstance(item, str) else self.service.check_token_ids(item, "input") for item in inputs
        ]
        text_indices = [n for n, item in enumerate(inputs) if isinstance(item, str)]
        self._check_tokens(rows, "input")
        # texts are tokenized group by group
        texts = [inputs[n] for n in text_indices]
        for group in self._encode_groups([len(text) for text in texts], "input"):
            token_rows = await self._encode(partial(encode_sentences, head=self.service.sentence), texts[group])
            for n, row in zip(text_indices[group], token_rows, strict=True):
                rows[n] = row
            self._check_tokens(rows, "input")
        self._check_rows(rows)
        self.service.rates.spend(sum(map(len, rows)))
        slices = embedding_slices(self.model, rows, self.service.sentence)
        return await self._run_slices(slices, adapter), sum(map(len, rows))

    async def score(
        self, prompts: Sequence[str | Messages] | None, texts: Sequence[str], adapter: str | None = None
    ) -> Scored:
        """(score, tokens) of each text: a reward, or the log-probability in nats that a language model gives it.

        prompts: what each text follows (its tokens are not scored), as many as texts; None for texts alone
        """
        if not (self.service.is_reward or self.service.engine is not None):
            raise ApiError(400, f"{self.service.name} gives no scores: it is for {self.service.purpose}")
        self._check_one_stack("scores")
        if not self.service.is_reward and any(not isinstance(prompt, str) for prompt in prompts or ()):
            raise ApiError(422, "prompt: messages are for reward models; give a text", param="prompt")
        prompt_sizes = {id(prompt): size_of(prompt) for prompt in prompts or ()}  # one prompt may precede all texts
        sizes = [len(text) + (prompt_sizes[id(prompts[n])] if prompts else 0) for n, text in enumerate(texts)]
        groups = self._encode_groups(sizes, "text")
        return await (self._score_rewards if self.service.is_reward else self._score_logprobs)(
            prompts, texts, groups, adapter
        )

    async def _score_rewards(
        self,
        prompts: Sequence[str | Messages] | None,
        texts: Sequence[str],
        groups: Iterator[slice],
        adapter: str | None,
    ) -> Scored:
        rows: list[Sequence[int]] = []
        # a reward model reads prompt and text as one conversation
        for group in groups:
            columns = [texts[group]] if prompts is None else [prompts[group], texts[group]]
            rows += await self._encode(encode_texts if prompts is None else reward_tokens, *columns)
            self._check_tokens(rows, "text")
        self._check_rows(rows)
        self.service.rates.spend(sum(map(len, rows)))
        rewards = await self._run_slices(reward_slices(self.model, rows), adapter)
        return list(zip(rewards.tolist(), map(len, rows), strict=True))

    async def _score_logprobs(
        self, prompts: Sequence[str] | None, texts: Sequence[str], groups: Iterator[slice], adapter: str | None
    ) -> Scored:
        # a text longer than the context becomes several windows, `owners` says whose
        rows: list[ScoredWindow] = []
        owners: list[int] = []
        for group in groups:
            encode = partial(logprob_windows, seq_len=self.model.config.max_seq_len, first=group.start)
            windows, text_numbers = await self._encode(
                encode, None if prompts is None else prompts[group], texts[group]
            )
            rows += windows
            owners += text_numbers
            self._check_tokens([row.tokens for row in rows], "text")
        self.service.rates.spend(sum(len(row.tokens) for row in rows))
        return await self._run_slices(logprob_slices(self.model, rows, owners, len(texts)), adapter)

    async def _encode(self, encode: Callable[..., T], *lists: Sequence[str | Messages] | None) -> T:
        size = sum(size_of(item) for items in lists if items is not None for item in items)
        return await self.service.tokenize_threads.encode(encode, *lists, size=size)

    async def _run_slices(self, slices: Slices[T], adapter: str | None) -> T:
        if is_onnx(self.service.path):
            name = self.service.name
            raise ApiError(400, f"{name} is an ONNX model, which writes only: serve the one it was made of")
        return await self.service.scoring_queue.run(slices, adapter=adapter)

    def _encode_groups(self, sizes: Sequence[int], param: str) -> Iterator[slice]:
        """Slices of texts of these sizes in characters that are tokenized together; ApiError 422 if they are too many."""
        most = self.limit * CHARACTERS
        if sum(sizes) > most:
            raise ApiError(
                422,
                f"{param}: {sum(sizes):,} characters in one request, at most {most:,} "
                f"({CHARACTERS} for each of max_input_tokens={self.limit:,})",
                param=param,
            )
        return group_by_size(sizes)

    def _check_tokens(self, rows: Sequence[Sequence[int]], param: str) -> None:
        n = sum(map(len, rows))
        if n > self.limit:
            raise ApiError(
                422, f"{param}: {n:,} tokens in one request, at most {self.limit:,} (max_input_tokens)", param=param
            )

    def _check_one_stack(self, what: str) -> None:
        if self.service.has_two_stacks:
            raise ApiError(
                400,
                f"{self.service.name} gives no {what}: it is an encoder-decoder, which reads one text and writes another",
            )

    def _check_rows(self, rows: Sequence[Sequence[int]]) -> None:
        for n, row in enumerate(rows):
            if len(row) == 0:
                raise ApiError(400, f"text {n} has no tokens", param="input")
            if len(row) > self.service.context:
                raise ApiError(
                    400, f"text {n} has {len(row)} tokens, the model reads at most {self.service.context}: shorten it"
                )


def group_by_size(sizes: Sequence[int]) -> Iterator[slice]:
    """Slices of neighbours with at most SHORT characters together; a longer text is alone.

    >>> [list(range(9))[group] for group in group_by_size([10_000, 6_000, 1_000, 20_000, 5])]
    [[0, 1], [2], [3], [4]]
    """
    begin = total = 0
    for n, size in enumerate(sizes):
        if n > begin and total + size > SHORT:
            yield slice(begin, n)
            begin, total = n, 0
        total += size
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def size_of(prompt: str | Sequence[Mapping[str, object]]) -> int:
    """Characters of a text, or of a conversation with an allowance for its chat template."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(TURN + len(str(turn["content"])) + len(str(turn.get("tool_calls", ""))) for turn in prompt)
