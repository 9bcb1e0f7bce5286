"""One request while it is being answered."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genai_pl.config.enums import Shape
from genai_pl.generation import Limits, TextStream
from genai_pl.generation.banned_tokens import Rules, build_rules
from genai_pl.generation.text import read_source
from genai_pl.models import Decoder, DecoderWithSource, KVCache, Model, WrappedDecoder
from genai_pl.serving.engine.request import EngineObserver, Request, SampledToken, TokenOutput, TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genai_pl.models.kv_cache import WrappedCache

log = logging.getLogger("genai_pl.serving")


class RequestState:
    """Its prompt, what it has written, and all that its next token depends on; `ending` says why it is over."""

    def __init__(
        self,
        request: Request,
        stream: TokenStream,
        *,
        limits: Limits,
        model: Model | WrappedDecoder,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.request, self.config, self.stream = request, request.config, stream
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # an encoder-decoder reads the prompt beside the text that it begins
        writes_beside = model.config.shape is Shape.encoder_decoder
        self.prompt = [model.config.start_token(pad)] if writes_beside else list(request.input_ids)
        vocab_size = model.config.vocab_size
        self.rules: Rules | None = build_rules(self.config, limits, torch.tensor([self.prompt]), None, vocab_size)
        self.text = TextStream(tokenizer, self.prompt, stop=self.config.stop, end_tokens=set(limits.ends))
        self.output_ids: list[int] = []
        self.finish_reason: str | None = None
        self.submit_time = self.last_token_time = time.monotonic()
        self.n_prefilled = 0  # of the prompt
        self.cache_start = (
            0  # where the prompt begins in the cache, which several prompts may share while they are read
        )
        self.model: Decoder | WrappedDecoder | DecoderWithSource | None = None
        self.cache: KVCache | WrappedCache | None = None
        self.generator: torch.Generator | None = None
        self.seen_tokens: Tensor | None = None  # (V,) what the repetition penalty counts

    def start(self, model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase", device: torch.device) -> None:
        """Get ready to read the prompt."""
        if model.config.shape is Shape.encoder_decoder:
            model = read_source(model, tokenizer, [list(self.request.input_ids)], self.prompt[0])
        self.model = model
        if self.config.temperature > 0:
            self.generator = torch.Generator(device)
            if self.request.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.request.seed)
        if self.config.repetition_penalty != 1:
            self.seen_tokens = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
            self.seen_tokens[self.prompt] = True

    def prefill_chunk(self, limit: int, device: torch.device) -> Tensor | None:
        """Read at most `limit` more tokens of the prompt; the logits (1, V) of what follows it once it is read."""
        new = self.prompt[self.n_prefilled : self.n_prefilled + limit]
        hidden = self.model.features(torch.tensor([new], device=device), cache=self.cache)
        self.n_prefilled += len(new)
        return self.model.logits(hidden[:, -1]) if self.n_prefilled == len(self.prompt) else None

    @property
    def n_tokens(self) -> int:
        """How many it reads and writes at most."""
        return len(self.prompt) + self.config.max_new_tokens

    @property
    def n_remaining(self) -> int:
        """How many it may still write, once it has begun."""
        return 0 if self.model is None else self.config.max_new_tokens - len(self.output_ids)

    @property
    def cache_end(self) -> int:
        """Where it ends in the cache."""
        return self.cache_start + len(self.prompt)

    def append_token(self, sampled: SampledToken, *, max_length: int) -> None:
        """Write a token; the last one brings the text that was held back."""
        self.output_ids.append(sampled.token)
        if self.seen_tokens is not None:
            self.seen_tokens[sampled.token] = True
        text = self.text.push(sampled.token)
        n = len(self.output_ids)
        if self.text.ended:
            self.finish_reason = "stop"
        elif n >= self.config.max_new_tokens or len(self.prompt) + n > max_length:
            self.finish_reason = "length"
            text += self.text.close()
        self.stream.put(TokenOutput(text, *sampled))

    def report_latency(self, observer: EngineObserver) -> None:
        """Say how long its newest token took."""
        now = time.monotonic()
        if len(self.output_ids) == 1:
            observer.first_token(now - self.submit_time)
        else:
            observer.token(now - self.last_token_time)
        self.last_token_time = now

    def check_stopped(self, now: float) -> None:
        """Set `ending` for an answer that nobody waits for any more."""
        if self.stream.is_cancelled:
            self.finish_reason = "cancelled"
        elif self.request.deadline is not None and now > self.request.deadline:
            self.finish_reason = "deadline"

    def finish(self, observer: EngineObserver) -> None:
        """Tell reader and observer why there is no more, and let go of all memory."""
        observer.finished(self.finish_reason, len(self.request.input_ids), len(self.output_ids))
        self.cache = self.model = self.seen_tokens = None
        self.stream.close(self.finish_reason)


@contextmanager
def isolate_failure(state: RequestState) -> Iterator[None]:
    """What fails inside because of this row ends it, and no other."""
    try:
        yield
    except Exception:
        log.exception("an answer ends, the others go on")
        state.finish_reason = "error"
