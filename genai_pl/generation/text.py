"""Prompts in, continuations out, as text."""

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genai_pl.errors import ConfigError
from genai_pl.generation.decode import decode, evaluating
from genai_pl.generation.stream import TextStream
from genai_pl.models import Encoder, EncoderDecoder, Model
from genai_pl.specs import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def generate_text(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    config: GenerationConfig,
    *,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    on_text: Callable[[int, str], None] | None = None,
) -> list[list[str]]:
    """`num_samples` continuations of every prompt, decoded in one batch.

    `on_text(i * num_samples + j, piece)` is given continuation j of prompt i as it grows; the pieces add up to it.
    """
    rows = [row for prompt in prompts for row in [encode_prompt(tokenizer, prompt)] * num_samples]
    texts = continue_rows(model, tokenizer, rows, config, generator=generator, on_text=on_text)
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def continue_rows(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    generator: torch.Generator | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[str]:
    """The text that follows each row of tokens, up to a stop string, eos or max_new_tokens.

    An encoder-decoder reads the row and writes a text of its own. The generator lives on the model's device.
    """
    if not rows:
        return []
    _check_rows(model, rows)
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    device = next(model.parameters()).device
    if isinstance(model, EncoderDecoder):
        model, rows = _read_source(model, tokenizer, rows, pad), [[pad]] * len(rows)
    input_ids, segment_ids = left_pad(rows, pad, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=input_ids.device)
    ends = end_tokens(tokenizer, config.stop)
    streams = [TextStream(tokenizer, row, stop=config.stop, end_tokens=ends) for row in rows]

    def show(row: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(row, piece)

    options = {"segment_ids": segment_ids, "generator": generator, "pad_token_id": pad, "finished": finished}
    with closing(decode(model, input_ids, config, **options)) as steps:  # on_text may raise
        for step in steps:
            for row, token in enumerate(step.tolist()):
                show(row, streams[row].push(token))
            finished.copy_(torch.tensor([stream.ended for stream in streams]))
    for row, stream in enumerate(streams):
        show(row, stream.close())
    return [stream.text for stream in streams]


def _read_source(
    model: EncoderDecoder, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]], pad: int
) -> nn.Module:
    """The decoder after the encoder has read the rows, each closed by the end token; it begins with the pad token."""
    end = tokenizer.eos_token_id
    closed = [row if end is None or row[-1] == end else [*row, end] for row in rows]
    with torch.no_grad(), evaluating(model):
        return model.reading(*left_pad(closed, pad, device=next(model.parameters()).device))


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """The tokens of a prompt; an empty one begins with bos, or with eos where the tokenizer has no bos."""
    tokens = tokenizer.encode(prompt)
    if tokens:
        return tokens
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ConfigError("prompt is empty and the tokenizer has neither a bos nor an eos token: give a prompt")
    return [start]


def end_tokens(tokenizer: "PreTrainedTokenizerBase", stop: Sequence[str]) -> set[int]:
    """Tokens that end a row: eos, and stop strings that are special tokens, which have no text to search."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = {special[s] for s in stop if s in special}
    return ends if tokenizer.eos_token_id is None else ends | {tokenizer.eos_token_id}


def _check_rows(model: Model, rows: Sequence[Sequence[int]]) -> None:
    if isinstance(model, Encoder):
        raise ConfigError("this model is an encoder: it reads text and writes none")
    if not all(rows):
        raise ConfigError("a prompt has no tokens: give each at least one")
    largest, size = max(max(row) for row in rows), model.config.vocab_size
    if largest >= size:
        raise ConfigError(f"the tokenizer gives token {largest}, the model knows {size}: they do not belong together")
