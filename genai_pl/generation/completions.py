"""Rows of tokens in, completions out: samples of one batch, speculated ones one by one, or beams."""

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
from genai_pl.generation.output_constraints import Limits
from genai_pl.generation.speculative import Acceptance, Target, build_proposer, speculate
from genai_pl.models import Decoder, DecoderWithSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnText = Callable[[int, str], None]  # (number of the continuation, text that has become complete)


class Completion(NamedTuple):
    """A continuation: its text, its tokens with those that ended it, and the model's own log-probabilities if asked for."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    score: float | None = None  # of a beam


@dataclass
class Writer:
    """What all ways of writing take: a model, its tokenizer, the rows it continues and how."""

    model: Decoder | DecoderWithSource
    tokenizer: "PreTrainedTokenizerBase"
    rows: Sequence[Sequence[int]]
    config: GenerationConfig
    limits: Limits
    pad: int
    on_text: OnText | None = None
    wants_logprobs: bool = False

    def samples(self, n: int, generator: torch.Generator | None) -> list[list[Completion]]:
        """n continuations of each row, decoded in one batch."""
        streams = [self.stream(i) for i in range(len(self.rows)) for _ in range(n)]
        input_ids, segment_ids = self._batch()
        finished = torch.zeros(len(streams), dtype=torch.bool, device=input_ids.device)
        logprobs: list[Tensor] | None = [] if self.wants_logprobs else None
        options = {"generator": generator, "num_samples": n, "pad_token_id": self.pad, "limits": self.limits}
        given = {"segment_ids": segment_ids, "finished": finished, "logprobs": logprobs}
        steps = decode(self.model, input_ids, self.config, **options, **given)
        found = self._follow(steps, streams, finished, logprobs, first=0)
        return [found[i : i + n] for i in range(0, len(found), n)]

    def speculated(
        self, n: int, generator: torch.Generator | None, draft: Decoder | None, acceptance: Acceptance | None
    ) -> list[list[Completion]]:
        """The same one after the other, as rows that accept unlike numbers of tokens would have to wait for each other."""
        found: list[list[Completion]] = []
        with nullcontext() if draft is None else evaluating(draft):
            for number, row in enumerate(self.rows):
                target = Target(self.model, row, self.config, self.limits)
                sizes = {
                    "n_tokens": len(row) + self.config.max_new_tokens,
                    "vocab_size": self.model.config.vocab_size,
                }
                proposer = build_proposer(self.config, draft, **sizes)
                found.append([])
                for sample in range(n):
                    finished = torch.zeros(1, dtype=torch.bool)
                    logprobs: list[Tensor] | None = [] if self.wants_logprobs else None
                    options = {"generator": generator, "finished": finished, "logprobs": logprobs}
                    steps = speculate(target, proposer, **options, acceptance=acceptance)
                    found[-1] += self._follow(
                        steps, [self.stream(number)], finished, logprobs, first=number * n + sample
                    )
        return found

    def beams(self) -> list[list[Completion]]:
        """The num_return best continuations of each row."""
        input_ids, segment_ids = self._batch()
        stopped = Branches(self) if self.config.stop else None
        options = {"segment_ids": segment_ids, "limits": self.limits, "stopped": stopped}
        completions = []
        for number, best in enumerate(beam_search(self.model, input_ids, self.config, **options)):
            if not best:
                raise ConfigError(
                    f"generation: no beam of prompt {number + 1} ends within generation.max_new_tokens as it must; "
                    "raise it, or loosen the constraint"
                )
            completions.append([])
            for place, (tokens, score, logprobs) in enumerate(best):
                stream = self.stream(number)
                for token in tokens:
                    stream.push(token)
                stream.close()
                self._show(number * self.config.num_return + place, stream.text)
                completions[-1].append(Completion(stream.text, tokens, logprobs, score))
        return completions

    def stream(self, number: int) -> TextStream:
        """The text of a continuation of a row, still empty."""
        ends = set(self.limits.ends)
        return TextStream(self.tokenizer, self.rows[number], stop=self.config.stop, end_tokens=ends)

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        return left_pad(self.rows, self.pad, device=next(self.model.parameters()).device)

    def _follow(
        self,
        steps: Generator[Tensor, None, None],
        streams: Sequence[TextStream],
        finished: Tensor,
        logprobs: list[Tensor] | None,
        *,
        first: int,
    ) -> list[Completion]:
        """What the steps say; streams that end are told to them by `finished`."""
        tokens: list[list[int]] = [[] for _ in streams]
        with closing(steps):  # on_text may raise
            for step in steps:
                for n, token in enumerate(step.tolist()):
                    if not streams[n].ended:
                        tokens[n].append(token)
                        self._show(first + n, streams[n].push(token))
                finished.copy_(torch.tensor([stream.ended for stream in streams]))
        for n, stream in enumerate(streams):
            self._show(first + n, stream.close())
        drawn = torch.stack(logprobs, dim=1).tolist() if logprobs else [[] for _ in streams]
        return [
            Completion(stream.text, row, found[: len(row)])
            for stream, row, found in zip(streams, tokens, drawn, strict=True)
        ]

    def _show(self, number: int, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(number, piece)


class Branches:
    """Whether a sequence's text has a stop string, for sequences that grow by a token at a time and share beginnings."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.length = 0
        self.shorter: dict[tuple[int, ...], TextStream] = {}  # by prompt and tokens, those of one token less
        self.streams: dict[tuple[int, ...], TextStream] = {}

    def __call__(self, prompt: int, tokens: Sequence[int]) -> bool:
        """Whether the continuation is over; those one token shorter were asked about before."""
        if len(tokens) != self.length:
            self.shorter, self.streams, self.length = self.streams, {}, len(tokens)
        *before, last = (prompt, *tokens)
        parent = self.shorter[tuple(before)] if len(tokens) > 1 else self.writer.stream(prompt)
        stream = parent.fork()
        stream.push(last)
        self.streams[(*before, last)] = stream
        return stream.ended


def left_pad(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """input_ids and segment_ids (B, T) of rows that end together; segment_ids is None where nothing is padded."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padded = [[pad] * (longest - len(row)) + list(row) for row in rows]
    input_ids = torch.tensor(padded, dtype=torch.long, device=device)
    if min(lengths) == longest:
        return input_ids, None
    first = longest - torch.tensor(lengths, device=device)
    return input_ids, (torch.arange(longest, device=device) >= first[:, None]).long()
