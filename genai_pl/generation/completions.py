"""Completions: the three decoding algorithms over prompts of token ids, with their text, tokens and log-probabilities.

Sampling decodes all prompts and samples in one batch; speculation decodes one continuation after the other; beam search
decodes `num_beams` rows per prompt. All three end a continuation by the same `TextStream`.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation.beam import beam_search
from genai_pl.generation.decode import decode, evaluating
from genai_pl.generation.detokenize import TextStream
from genai_pl.generation.output_constraints import OutputConstraints
from genai_pl.generation.prefix_cache import PrefixCache
from genai_pl.generation.speculative import Acceptance, TargetModel, build_proposer, speculate
from genai_pl.models import Decoder, DecoderWithSource
from genai_pl.peft.adapter import RowWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnText = Callable[[int, str], None]  # (number of the continuation, text that has become complete)


class Completion(NamedTuple):
    """One continuation: its `text` up to a stop string or end token, and its `tokens`, the one that ended it included.

    logprobs: the model's own log-probability of each token; empty unless requested. score: of a beam, its `Hypothesis.score`.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    score: float | None = None  # of a beam


@dataclass
class CompletionRunner:
    """A model with the prompts to continue; each method runs one decoding algorithm on them.

    model: on the device to decode on. tokenizer: turns ids back into text. rows: ids of each prompt; for an encoder-decoder, the
        start token of each target. config: decoding options. constraints: those of them that are text, as ids.
    pad: id that fills prompts on the left. wants_logprobs: whether `Completion.logprobs` is filled.
    on_text: called as on_text(i, delta) while continuation i grows; it may raise, which ends decoding.
    row_weights: weights of adapters for each prompt, or None. prefix_cache: as of `decode`, for `sample` alone.
    """

    model: Decoder | DecoderWithSource
    tokenizer: "PreTrainedTokenizerBase"
    rows: Sequence[Sequence[int]]
    config: GenerationConfig
    constraints: OutputConstraints
    pad: int
    on_text: OnText | None = None
    wants_logprobs: bool = False
    row_weights: RowWeights | None = None
    prefix_cache: PrefixCache | None = None

    def sample(self, n: int, generator: torch.Generator | None) -> list[list[Completion]]:
        """n continuations of each prompt, decoded in one batch of len(rows) * n rows."""
        # `finished` is shared: `decode` sets it at end tokens, `_collect` at stop strings
        streams = [self.text_stream(i) for i in range(len(self.rows)) for _ in range(n)]
        input_ids, segment_ids = self._batch()
        finished = torch.zeros(len(streams), dtype=torch.bool, device=input_ids.device)
        logprobs: list[Tensor] | None = [] if self.wants_logprobs else None
        steps = decode(
            self.model,
            input_ids,
            self.config,
            segment_ids=segment_ids,
            generator=generator,
            pad_token_id=self.pad,
            finished=finished,
            num_samples=n,
            constraints=self.constraints,
            logprobs=logprobs,
            row_weights=self.row_weights,
            prefix_cache=self.prefix_cache,
        )
        completions = self._collect(steps, streams, finished, logprobs, first=0)
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def speculate(
        self, n: int, generator: torch.Generator | None, draft: Decoder | None, acceptance: Acceptance | None
    ) -> list[list[Completion]]:
        """n continuations of each prompt by speculative decoding, one after the other.

        A batch would wait, at each step, for the row that accepts most draft tokens; so rows are decoded alone, and a prompt is
        prefilled once for its n samples. draft: the model of `generation.draft`, or None for prompt lookup.
        """
        completions: list[list[Completion]] = []
        with nullcontext() if draft is None else evaluating(draft):
            for number, row in enumerate(self.rows):
                # one target and one proposer per prompt: their caches keep it between its samples
                weights = None if self.row_weights is None else self.row_weights.select(torch.tensor([number]))
                target = TargetModel(self.model, row, self.config, self.constraints, weights)
                sizes = {
                    "n_tokens": len(row) + self.config.max_new_tokens,
                    "vocab_size": self.model.config.vocab_size,
                }
                proposer = build_proposer(self.config, draft, **sizes)
                completions.append([])
                for sample in range(n):
                    finished = torch.zeros(1, dtype=torch.bool)
                    logprobs: list[Tensor] | None = [] if self.wants_logprobs else None
                    options = {"generator": generator, "finished": finished, "logprobs": logprobs}
                    steps = speculate(target, proposer, **options, acceptance=acceptance)
                    completions[-1] += self._collect(
                        steps, [self.text_stream(number)], finished, logprobs, first=number * n + sample
                    )
        return completions

    def beam_search(self) -> list[list[Completion]]:
        """The num_return best continuations of each prompt; ConfigError where no beam satisfies the constraints in time."""
        input_ids, segment_ids = self._batch()
        hypotheses = beam_search(
            self.model,
            input_ids,
            self.config,
            segment_ids=segment_ids,
            constraints=self.constraints,
            stop_check=StopStringTracker(self) if self.config.stop else None,
            row_weights=self.row_weights,
        )
        completions = []
        for number, best in enumerate(hypotheses):
            if not best:
                raise ConfigError(
                    f"generation: no beam of prompt {number + 1} ends within generation.max_new_tokens as it must; "
                    "raise it, or loosen the constraint"
                )
            completions.append([])
            for place, (tokens, score, logprobs) in enumerate(best):
                # the text is decoded again from the winner's tokens: the trackers' streams are gone
                stream = self.text_stream(number)
                for token in tokens:
                    stream.push(token)
                stream.close()
                self._emit(number * self.config.num_return + place, stream.text)
                completions[-1].append(Completion(stream.text, tokens, logprobs, score))
        return completions

    def text_stream(self, number: int) -> TextStream:
        """An empty `TextStream` that continues prompt `number`."""
        ends = set(self.constraints.ends)
        return TextStream(self.tokenizer, self.rows[number], stop=self.config.stop, end_tokens=ends)

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        """input_ids and segment_ids (B, T) of the prompts on the model's device."""
        return left_pad(self.rows, self.pad, device=next(self.model.parameters()).device)

    def _collect(
        self,
        steps: Generator[Tensor, None, None],
        streams: Sequence[TextStream],
        finished: Tensor,
        logprobs: list[Tensor] | None,
        *,
        first: int,
    ) -> list[Completion]:
        """Completions from a decoding generator, run to its end.

        steps: yields the tokens (N,) of each step, one per stream. finished: (N,) bool, which the generator reads; set here where
            a stop string ends a stream, which ids alone do not show. logprobs: the list that the generator fills.
        """
        tokens: list[list[int]] = [[] for _ in streams]
        with closing(steps):  # on_text may raise
            for step in steps:
                for n, token in enumerate(step.tolist()):
                    if not streams[n].ended:
                        tokens[n].append(token)
                        self._emit(first + n, streams[n].push(token))
                finished.copy_(torch.tensor([stream.ended for stream in streams]))
        # text held back as the possible start of a stop string is final now
        for n, stream in enumerate(streams):
            self._emit(first + n, stream.close())
        # (steps, N) -> N lists; a row that ended early has values for padding too
        logprobs_by_row = torch.stack(logprobs, dim=1).tolist() if logprobs else [[] for _ in streams]
        return [
            Completion(stream.text, row, row_logprobs[: len(row)])
            for stream, row, row_logprobs in zip(streams, tokens, logprobs_by_row, strict=True)
        ]

    def _emit(self, number: int, delta: str) -> None:
        """Pass new text of a continuation to on_text."""
        if delta and self.on_text is not None:
            self.on_text(number, delta)


class StopStringTracker:
    """Stop-string check for beams, which share prefixes: the stream of a candidate forks the stream of its prefix.

    Only the streams of the last two lengths are kept. Decoding each candidate from its first token would be quadratic in length.
    """

    def __init__(self, runner: CompletionRunner) -> None:
        self.runner = runner
        self.length = 0
        self.shorter: dict[tuple[int, ...], TextStream] = {}  # by prompt and tokens, those of one token less
        self.streams: dict[tuple[int, ...], TextStream] = {}

    def __call__(self, prompt: int, tokens: Sequence[int]) -> bool:
        """True if the continuation contains a stop string or end token.

        prompt: number of the prompt. tokens: ids of the continuation, whose prefix without the last one was checked before.
        """
        if len(tokens) != self.length:
            self.shorter, self.streams, self.length = self.streams, {}, len(tokens)
        *before, last = (prompt, *tokens)
        parent = self.shorter[tuple(before)] if len(tokens) > 1 else self.runner.text_stream(prompt)
        stream = parent.fork()
        stream.push(last)
        self.streams[(*before, last)] = stream
        return stream.ended


def left_pad(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """input_ids and segment_ids (B, T) of rows padded on the left, so that all rows end in the same column.

    segment_ids is 1 on tokens and 0 on padding, or None where all rows have the same length.

    >>> left_pad([[7, 8, 9], [5]], 0)[0].tolist()
    [[7, 8, 9], [0, 0, 5]]
    """
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padded = [[pad] * (longest - len(row)) + list(row) for row in rows]
    input_ids = torch.tensor(padded, dtype=torch.long, device=device)
    if min(lengths) == longest:
        return input_ids, None
    first = longest - torch.tensor(lengths, device=device)
    return input_ids, (torch.arange(longest, device=device) >= first[:, None]).long()
