"""Prompts in, continuations out, as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from genai_pl.config.enums import Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.data import prompt_tokens as chat
from genai_pl.errors import ConfigError
from genai_pl.generation.completions import Completion, OnText, Writer, left_pad
from genai_pl.generation.decode import evaluating
from genai_pl.generation.output_constraints import limits_of
from genai_pl.generation.speculative import Acceptance
from genai_pl.models import Decoder, DecoderWithSource, Encoder, EncoderDecoder, Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_text(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | chat.Messages],
    config: GenerationConfig,
    *,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    on_text: OnText | None = None,
) -> list[list[str]]:
    """`num_samples` continuations of every prompt, or its `num_return` best beams.

    `on_text(i * num_samples + j, piece)` is given continuation j of prompt i as it grows; the pieces add up to it.
    """
    options = {"generator": generator, "num_samples": num_samples, "on_text": on_text}
    found = complete(model, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], config, **options)
    return [[completion.text for completion in of_prompt] for of_prompt in found]


def continue_rows(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    generator: torch.Generator | None = None,
    on_text: OnText | None = None,
) -> list[str]:
    """The text that follows each row of tokens, up to a stop string, an end token or max_new_tokens."""
    return [c[0].text for c in complete(model, tokenizer, rows, config, generator=generator, on_text=on_text)]


def complete(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    on_text: OnText | None = None,
    logprobs: bool = False,
    draft: Decoder | None = None,
    acceptance: Acceptance | None = None,
) -> list[list[Completion]]:
    """The continuations of each row of tokens: `num_samples` of them, or the `num_return` best beams.

    An encoder-decoder reads the row and writes a text of its own. The generator lives on the model's device; `draft` is
    the model that `generation.draft` names, and `acceptance` counts what becomes of proposed tokens. Adapters that
    differ by row need one row for each continuation: num_samples=1, and neither beams nor speculation.
    """
    if not rows:
        return []
    _check_rows(model, rows)
    check_bias(config, model.config.vocab_size)
    if config.num_beams > 1 and num_samples > 1:
        raise ConfigError(f"num_samples={num_samples} has no use with beams: set generation.num_return")
    if config.speculates and model.config.shape is Shape.encoder_decoder:
        raise ConfigError("generation.draft and generation.prompt_lookup need a decoder, this is an encoder-decoder")
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    limits = limits_of(tokenizer, config, model.config.eos_token_ids)
    if model.config.shape is Shape.encoder_decoder:
        model, rows = read_source(model, tokenizer, rows, pad), [[model.config.start_token(pad)]] * len(rows)
    options = {"pad": pad, "on_text": on_text, "wants_logprobs": logprobs}
    writer = Writer(model, tokenizer, rows, config, limits, **options)
    if config.num_beams > 1:
        return writer.beams()
    if config.speculates:
        return writer.speculated(num_samples, generator, draft, acceptance)
    return writer.samples(num_samples, generator)


def read_source(
    model: EncoderDecoder, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]], pad: int
) -> DecoderWithSource:
    """The decoder after the encoder has read the rows, each closed by the end token; it begins with the start token."""
    end = tokenizer.eos_token_id
    closed = [row if end is None or row[-1] == end else [*row, end] for row in rows]
    with torch.no_grad(), evaluating(model):
        return model.encode_source(*left_pad(closed, pad, device=next(model.parameters()).device))


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | chat.Messages,
    tools: chat.Tools = (),
    template: chat.ChatTemplate | None = None,
) -> list[int]:
    """The tokens of a prompt, as in training; an empty one begins with bos, or with eos where the tokenizer has no bos."""
    tokens = chat.encode_prompt(tokenizer, prompt, tools, template).tolist()
    if tokens:
        return tokens
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ConfigError("prompt is empty and the tokenizer has neither a bos nor an eos token: give a prompt")
    return [start]


def check_bias(config: GenerationConfig, vocab_size: int) -> None:
    """ConfigError where a token that is to be more or less likely is not one of the model's."""
    unknown = next((token for token in config.logit_bias if token >= vocab_size), None)
    if unknown is not None:
        raise ConfigError(f"generation.logit_bias: token {unknown} is not one of the model's {vocab_size}")


def _check_rows(model: Model, rows: Sequence[Sequence[int]]) -> None:
    if isinstance(model, Encoder):
        raise ConfigError("this model is an encoder: it reads text and writes none")
    if not all(rows):
        raise ConfigError("a prompt has no tokens: give each at least one")
    largest, size = max(max(row) for row in rows), model.config.vocab_size
    if largest >= size:
        raise ConfigError(f"the tokenizer gives token {largest}, the model knows {size}: they do not belong together")
