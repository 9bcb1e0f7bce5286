"""Request state: prompt, output, cache and sampling state of one request from submission to its end."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genai_pl.config.enums import Shape
from genai_pl.generation import OutputConstraints, TextStream
from genai_pl.generation.banned_tokens import BannedTokens, build_banned_tokens
from genai_pl.generation.text import encode_sources
from genai_pl.models import Decoder, DecoderWithSource, KVCache, Model, WrappedDecoder
from genai_pl.serving.engine.request import EngineObserver, Request, SampledToken, TokenOutput, TokenStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from genai_pl.models.hf.transformers_cache import WrappedCache

log = logging.getLogger("genai_pl.serving")


class RequestState:
    """Everything that the next token of one request depends on.

    request, stream: the settings, and where the outputs go
    constraints: end tokens, banned words, prefix and grammar of the settings, as tokens
    model, tokenizer: the shape of the model and the detokenizer; no pass runs before `start`

    Attributes that other files use:
    prompt: token ids that the decoder reads first; of an encoder-decoder only its start token
    output_ids: generated token ids
    finish_reason: None while the request is alive; once it is set, the engine removes the request after the current step
    n_prefilled: prompt tokens whose keys and values are in `cache`
    cache, cache_start: the KV cache of prefill, and the column of the prompt's first token in it
    generator, seen_tokens, token_counts: the request's own random numbers, the tokens (V,) that the repetition penalty counts,
    and how often each was generated (V,), for presence and frequency penalty

    One thread at a time touches a state: the submitting one until it is queued, then the engine's.
    """

    def __init__(
        self,
        request: Request,
        stream: TokenStream,
        *,
        constraints: OutputConstraints,
        model: Model | WrappedDecoder,
        tokenizer: "PreTrainedTokenizerBase",
    ) -> None:
        self.request, self.config, self.stream = request, request.config, stream
        pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # an encoder-decoder reads the prompt with its encoder: the decoder's text begins with a start token
        writes_beside = model.config.shape is Shape.encoder_decoder
        self.prompt = [model.config.start_token(pad)] if writes_beside else list(request.input_ids)
        # text that the request forbids, requires and ends with
        vocab_size = model.config.vocab_size
        self.banned_tokens: BannedTokens | None = build_banned_tokens(
            self.config, constraints, torch.tensor([self.prompt]), None, vocab_size
        )
        self.text = TextStream(tokenizer, self.prompt, stop=self.config.stop, end_tokens=set(constraints.ends))
        self.output_ids: list[int] = []
        self.finish_reason: str | None = None
        self.submit_time = self.last_token_time = time.monotonic()
        self.n_prefilled = 0
        self.cache_start = 0  # above 0 where several prompts share a cache while they are read
        self.model: Decoder | WrappedDecoder | DecoderWithSource | None = None
        self.cache: KVCache | WrappedCache | None = None
        self.generator: torch.Generator | None = None
        self.seen_tokens: Tensor | None = None
        self.token_counts: Tensor | None = None

    def start(self, model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase", device: torch.device) -> None:
        """Prepare prefill, once the request has a slot: all that takes memory on the device is allocated here.

        The adapter of the request must be active, since an encoder-decoder's encoder runs.
        """
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
            self.seen_tokens = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
            self.seen_tokens[self.prompt] = True
        if self.config.counts_tokens:
            self.token_counts = torch.zeros(model.config.vocab_size, device=device)

    def prefill_chunk(self, limit: int, device: torch.device) -> Tensor | None:
        """Read at most `limit` more tokens of the prompt into the cache.

        Returns the logits (1, V) that follow the prompt once all of it is read, None before.
        """
        new = self.prompt[self.n_prefilled : self.n_prefilled + limit]
        hidden = self.model.features(torch.tensor([new], device=device), cache=self.cache)
        self.n_prefilled += len(new)
        return self.model.logits(hidden[:, -1]) if self.n_prefilled == len(self.prompt) else None

    @property
    def n_tokens(self) -> int:
        """Prompt and longest answer in tokens: the cost of the request for its client's turns."""
        return len(self.prompt) + self.config.max_new_tokens

    @property
    def n_remaining(self) -> int:
        """Tokens that the answer may still get; 0 before `start` and after `finish`, when nothing is held for it."""
        return 0 if self.model is None else self.config.max_new_tokens - len(self.output_ids)

    @property
    def cache_end(self) -> int:
        """Column after the prompt's last token in the cache."""
        return self.cache_start + len(self.prompt)

    def append_token(self, sampled: SampledToken, *, max_length: int) -> None:
        """Add a token to the output and hand its text to the reader; sets `finish_reason` if it is the last one.

        max_length: tokens of prompt and output together. The last output token is never read, so the output may have one
        token more than the context.
        """
        self.output_ids.append(sampled.token)
        if self.seen_tokens is not None:
            self.seen_tokens[sampled.token] = True
        if self.token_counts is not None:
            self.token_counts[sampled.token] += 1
        text = self.text.push(sampled.token)
        n = len(self.output_ids)
        if self.text.ended:
            self.finish_reason = "stop"
        elif n >= self.config.max_new_tokens or len(self.prompt) + n > max_length:
            self.finish_reason = "length"
            text += self.text.close()  # what was held back as the possible beginning of a stop string
        self.stream.put(TokenOutput(text, *sampled))

    def report_latency(self, observer: EngineObserver) -> None:
        """Report the seconds that the newest token took: since submission for the first one, else since the last."""
        now = time.monotonic()
        if len(self.output_ids) == 1:
            observer.first_token(now - self.submit_time)
        else:
            observer.token(now - self.last_token_time)
        self.last_token_time = now

    def check_stopped(self, now: float) -> None:
        """Set `finish_reason` if the reader has cancelled or the deadline has passed at `now` on time.monotonic()."""
        if self.stream.is_cancelled:
            self.finish_reason = "cancelled"
        elif self.request.deadline is not None and now > self.request.deadline:
            self.finish_reason = "deadline"

    def finish(self, observer: EngineObserver) -> None:
        """Report the finish reason to observer and reader, and drop all references to tensors."""
        observer.finished(self.finish_reason, len(self.request.input_ids), len(self.output_ids))
        self.cache = self.model = self.seen_tokens = self.token_counts = None
        self.stream.close(self.finish_reason)


@contextmanager
def isolate_failure(state: RequestState) -> Iterator[None]:
    """Context in which an exception ends this request with "error" instead of the whole step.

    For work on one request only: an exception of a pass that several share must leave the context, since it is unknown
    which of them is to blame.
    """
    try:
        yield
    except Exception:
        log.exception("an answer ends, the others go on")
        state.finish_reason = "error"
