"""One request while it is being answered."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genai_pl.config.enums import Shape
from genai_pl.generation import OutputConstraints, TextStream
from genai_pl.generation.banned_tokens import BannedTokens, build_banned_tokens
from genai_pl.generation.text import encode_sources
from genai_pl.models import Decoder, DecoderWithSource, KVCache, Model, WrappedDecoder
from genai_pl.serving.engine.request import Observer, Piece, Request, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genai_pl.models.kv_cache import WrappedCache

log = logging.getLogger("genai_pl.serving")


class Row:
    """Its prompt, what it has written, and all that its next token depends on; `ending` says why it is over."""

    def __init__(
        self,
        request: Request,
        stream: Stream,
        *,
        constraints: OutputConstraints,
        model: Model | WrappedDecoder,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.request, self.config, self.stream = request, request.config, stream
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # an encoder-decoder reads the prompt beside the text that it begins
        writes_beside = model.config.shape is Shape.encoder_decoder
        self.prompt = [model.config.start_token(pad)] if writes_beside else list(request.input_ids)
        vocab_size = model.config.vocab_size
        self.banned_tokens: BannedTokens | None = build_banned_tokens(
            self.config, constraints, torch.tensor([self.prompt]), None, vocab_size
        )
        self.text = TextStream(tokenizer, self.prompt, stop=self.config.stop, end_tokens=set(constraints.ends))
        self.written: list[int] = []
        self.ending: str | None = None
        self.submitted = self.told = time.monotonic()
        self.n_read = 0  # of the prompt
        self.begin = 0  # where the prompt begins in the cache, which several prompts may share while they are read
        self.model: Decoder | WrappedDecoder | DecoderWithSource | None = None
        self.cache: KVCache | WrappedCache | None = None
        self.generator: torch.Generator | None = None
        self.seen: Tensor | None = None  # (V,) what the repetition penalty counts

    def open(self, model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase", device: torch.device) -> None:
        """Get ready to read the prompt."""
        if model.config.shape is Shape.encoder_decoder:
            model = encode_sources(model, tokenizer, [list(self.request.input_ids)], self.prompt[0])
        self.model = model
        if self.config.temperature > 0:
            self.generator = torch.Generator(device)
            if self.request.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.request.seed)
        if self.config.repetition_penalty != 1:
            self.seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
            self.seen[self.prompt] = True

    def read(self, limit: int, device: torch.device) -> Tensor | None:
        """Read at most `limit` more tokens of the prompt; the logits (1, V) of what follows it once it is read."""
        new = self.prompt[self.n_read : self.n_read + limit]
        hidden = self.model.features(torch.tensor([new], device=device), cache=self.cache)
        self.n_read += len(new)
        return self.model.logits(hidden[:, -1]) if self.n_read == len(self.prompt) else None

    @property
    def n_tokens(self) -> int:
        """How many it reads and writes at most."""
        return len(self.prompt) + self.config.max_new_tokens

    @property
    def n_unwritten(self) -> int:
        """How many it may still write, once it has begun."""
        return 0 if self.model is None else self.config.max_new_tokens - len(self.written)

    @property
    def end_of_prompt(self) -> int:
        """Where it ends in the cache."""
        return self.begin + len(self.prompt)

    def take(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...], *, max_length: int) -> None:
        """Write a token; the last one brings the text that was held back."""
        self.written.append(token)
        if self.seen is not None:
            self.seen[token] = True
        text = self.text.push(token)
        n = len(self.written)
        if self.text.ended:
            self.ending = "stop"
        elif n >= self.config.max_new_tokens or len(self.prompt) + n > max_length:
            self.ending = "length"
            text += self.text.close()
        self.stream.put(Piece(text, token, logprob, top))

    def tell(self, observer: Observer) -> None:
        """Say how long its newest token took."""
        now = time.monotonic()
        if len(self.written) == 1:
            observer.first_token(now - self.submitted)
        else:
            observer.token(now - self.told)
        self.told = now

    def check(self, now: float) -> None:
        """Set `ending` for an answer that nobody waits for any more."""
        if self.stream.is_cancelled:
            self.ending = "cancelled"
        elif self.request.deadline is not None and now > self.request.deadline:
            self.ending = "deadline"

    def end(self, observer: Observer) -> None:
        """Tell reader and observer why there is no more, and let go of all memory."""
        observer.finished(self.ending, len(self.request.input_ids), len(self.written))
        self.cache = self.model = self.seen = None
        self.stream.end(self.ending)


@contextmanager
def ending_alone(row: Row) -> Iterator[None]:
    """What fails inside because of this row ends it, and no other."""
    try:
        yield
    except Exception:
        log.exception("an answer ends, the others go on")
        row.ending = "error"


def n_together(waiting: Iterable[Row], free: int, limit: int) -> int:
    """How many of those that wait are read next, of one adapter: with at most `limit` tokens in all, but one anyhow."""
    n, total, adapter = 0, 0, None
    for row in islice(waiting, max(0, free)):
        total += len(row.prompt)
        if n > 0 and (row.request.adapter != adapter or total > limit):
            break
        n, adapter = n + 1, row.request.adapter
    return n


def share_cache(rows: list[Row], room: int) -> None:
    """Give rows one cache for so many tokens, in which their prompts stand one after the other."""
    cache, begin = rows[0].model.new_cache(1, room), 0
    for row in rows:
        row.cache, row.begin = cache, begin
        begin = row.end_of_prompt


def read_whole(rows: list[Row], device: torch.device) -> Tensor:
    """The logits (B, V) of what follows each prompt, all of them read as the documents of one packed row."""
    input_ids = torch.tensor([[token for row in rows for token in row.prompt]], device=device)
    documents = [[n + 1] * len(row.prompt) for n, row in enumerate(rows)]
    segment_ids = torch.tensor([[n for document in documents for n in document]], device=device)
    hidden = rows[0].model.features(input_ids, segment_ids, cache=rows[0].cache)
    for row in rows:
        row.n_read = len(row.prompt)
    logits = rows[0].model.logits(hidden[0, [row.end_of_prompt - 1 for row in rows]])
    if logits.amax().isfinite():
        return logits
    for row in rows:  # what is no number reaches all of a pass: each alone
        row.n_read = 0
        share_cache([row], len(row.prompt))
    return torch.cat([row.read(len(row.prompt), device) for row in rows])
