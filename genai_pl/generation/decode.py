"""The decoding loop: what has been read, the next token, and again."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.generation.processors import sample
from genai_pl.models import Decoder
from genai_pl.specs import GenerationConfig


class Context:
    """What a batch has read, at most max_seq_len tokens, with the cache of it.

    When the cache is full, a new one reads the last half of the text again, as if nothing had stood before it:
    positions restart, and no token ever sees more than max_seq_len others.
    """

    def __init__(self, model: Decoder, batch_size: int, n_tokens: int) -> None:
        self.model = model
        self.cache = model.new_cache(batch_size, min(n_tokens, model.config.max_seq_len))
        self.tokens: list[Tensor] = []
        self.segments: list[Tensor] = []

    def read(self, input_ids: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """Logits (B, V) of what follows the tokens (B, T), which follow all that was read before."""
        self.tokens.append(input_ids)
        if segment_ids is not None:
            self.segments.append(segment_ids)
        if self.cache.length + input_ids.shape[1] > self.cache.max_length:
            input_ids, segment_ids = self._restart()
        hidden = self.model.features(input_ids, segment_ids, cache=self.cache)
        return self.model.logits(hidden[:, -1])

    def _restart(self) -> tuple[Tensor, Tensor | None]:
        length = self.model.config.max_seq_len
        kept = max(1, length // 2)
        del self.cache  # never two caches at once
        self.tokens = [torch.cat(self.tokens, dim=1)[:, -kept:]]
        self.segments = [torch.cat(self.segments, dim=1)[:, -kept:]] if self.segments else []
        self.cache = self.model.new_cache(self.tokens[0].shape[0], length)
        return self.tokens[0], self.segments[0] if self.segments else None


@torch.no_grad()  # as a decorator it leaves the caller's mode alone between two steps
def decode(
    model: Decoder,
    input_ids: Tensor,
    config: GenerationConfig,
    *,
    segment_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    finished: Tensor | None = None,
) -> Generator[Tensor, None, None]:
    """The next tokens (B,) of each step, until every row is finished or max_new_tokens are reached.

    Prompts of unequal length are padded on the left, where segment_ids is 0. `finished` (B,) bool belongs to the
    caller: eos sets a row of it, and so may the caller between two steps; a finished row yields pad_token_id. The
    model is in evaluation mode until the iterator is exhausted or closed.
    """
    _check(model, input_ids, segment_ids)
    B, T = input_ids.shape
    if finished is None:
        finished = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    segment = None if segment_ids is None else segment_ids[:, -1:]  # a continuation belongs to the last document
    seen = None if config.repetition_penalty == 1 else _seen(input_ids, segment_ids, model.config.vocab_size)
    with evaluating(model):
        context = Context(model, B, T + config.max_new_tokens - 1)  # nobody reads the last token
        logits = context.read(input_ids, segment_ids)
        for n_left in reversed(range(config.max_new_tokens)):
            token = sample(logits, config, generator, seen=seen).masked_fill_(finished, pad_token_id)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            if eos_token_id is not None:
                finished |= token == eos_token_id
            yield token
            if n_left == 0 or finished.all():
                return
            logits = context.read(token[:, None], segment)


def generate(
    model: Decoder,
    input_ids: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None = None,
    *,
    segment_ids: Tensor | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
) -> Tensor:
    """Prompts and continuations (B, T + n), n <= max_new_tokens: a row ends with eos, pad_token_id fills up."""
    steps = decode(
        model,
        input_ids,
        config,
        segment_ids=segment_ids,
        generator=generator,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    return torch.cat([input_ids, torch.stack(list(steps), dim=1)], dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards exactly those modules train that trained before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check(model: Decoder, input_ids: Tensor, segment_ids: Tensor | None) -> None:
    n_tokens, limit = input_ids.shape[1], model.config.max_seq_len
    if n_tokens == 0:
        raise ConfigError("the prompt is empty: give at least one token")
    if n_tokens > limit:
        raise ConfigError(
            f"the prompt has {n_tokens} tokens, the model reads at most {limit} (model.max_seq_len): shorten the prompt"
        )
    if segment_ids is not None and not segment_ids[:, -1].all():
        raise ValueError("prompts must be padded on the left: segment_ids ends in 0")


def _seen(input_ids: Tensor, segment_ids: Tensor | None, vocab_size: int) -> Tensor:
    """Which tokens (B, V) stand in each prompt, padding left out."""
    present = torch.ones_like(input_ids) if segment_ids is None else (segment_ids > 0).long()
    counts = torch.zeros(input_ids.shape[0], vocab_size, dtype=torch.long, device=input_ids.device)
    return counts.scatter_add_(1, input_ids, present) > 0
