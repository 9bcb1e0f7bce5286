"""Text generation: prompts as text or messages in, continuations as text out.

`generate_text` is the short form; `complete` takes ids and returns `Completion`s with tokens and log-probabilities.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from genai_pl.config.enums import Shape
from genai_pl.config.generation import GenerationConfig
from genai_pl.data import prompt_tokens as chat
from genai_pl.errors import ConfigError
from genai_pl.generation.completions import Completion, CompletionRunner, OnText, left_pad
from genai_pl.generation.decode import evaluating
from genai_pl.generation.output_constraints import build_output_constraints
from genai_pl.generation.prefix_cache import PrefixCache
from genai_pl.generation.speculative import Acceptance
from genai_pl.models import Decoder, DecoderWithSource, Encoder, EncoderDecoder, Model
from genai_pl.peft.adapter import RowWeights

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
    """`num_samples` continuations of every prompt (a text, or messages for the chat template), or its `num_return` best beams.

    on_text: called as on_text(i * num_samples + j, delta) while continuation j of prompt i grows; its deltas add up to the text.
    """
    options = {"generator": generator, "num_samples": num_samples, "on_text": on_text}
    completions = complete(
        model, tokenizer, [encode_prompt(tokenizer, prompt) for prompt in prompts], config, **options
    )
    return [[completion.text for completion in of_prompt] for of_prompt in completions]


def continue_rows(
    model: Model,
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    generator: torch.Generator | None = None,
    on_text: OnText | None = None,
) -> list[str]:
    """One continuation of each row of ids as text, up to a stop string, an end token or max_new_tokens."""
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
    row_weights: RowWeights | None = None,
    prefix_cache: PrefixCache | None = None,
) -> list[list[Completion]]:
    """The continuations of each prompt: `num_samples` of them, or the `num_return` best beams.

    rows: ids of each prompt; of an encoder-decoder, of each source, and the continuation is the target.
    generator: on the model's device. on_text: see `CompletionRunner`. logprobs: whether completions hold log-probabilities.
    draft: the model that `generation.draft` names. acceptance: counts of proposed and accepted tokens, increased in place.
    row_weights: weights of adapters for each row of `rows`; the draft model has none.
    prefix_cache: keys and values of the last call, whose texts these rows continue; beams and speculation leave it alone.

    ConfigError for empty prompts, ids outside the vocabulary, and options that exclude each other.
    """
    # refuse what cannot work before any memory is allocated
    if not rows:
        return []
    _check_rows(model, rows)
    check_bias(config, model.config.vocab_size)
    if config.num_beams > 1 and num_samples > 1:
        raise ConfigError(f"num_samples={num_samples} has no use with beams: set generation.num_return")
    if config.speculates and model.config.shape is Shape.encoder_decoder:
        raise ConfigError("generation.draft and generation.prompt_lookup need a decoder, this is an encoder-decoder")
    # options that are text become ids; an encoder-decoder encodes its sources and starts from one token each
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    constraints = build_output_constraints(tokenizer, config, model.config.eos_token_ids)
    if model.config.shape is Shape.encoder_decoder:
        with nullcontext() if row_weights is None else row_weights.applied():
            model, rows = encode_sources(model, tokenizer, rows, pad), [[model.config.start_token(pad)]] * len(rows)
    options = {"pad": pad, "on_text": on_text, "wants_logprobs": logprobs, "row_weights": row_weights}
    options["prefix_cache"] = prefix_cache
    runner = CompletionRunner(model, tokenizer, rows, config, constraints, **options)
    # one of three algorithms
    if config.num_beams > 1:
        return runner.beam_search()
    if config.speculates:
        return runner.speculate(num_samples, generator, draft, acceptance)
    return runner.sample(num_samples, generator)


def encode_sources(
    model: EncoderDecoder, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Sequence[int]], pad: int
) -> DecoderWithSource:
    """The decoder of an encoder-decoder with the sources encoded, ready to decode targets.

    rows: ids of each source; the end token is appended where it is missing, as in training.
    """
    end = tokenizer.eos_token_id
    closed = [row if end is None or row[-1] == end else [*row, end] for row in rows]
    with torch.no_grad(), evaluating(model):
        return model.encode_source(*left_pad(closed, pad, device=next(model.parameters()).device))


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | chat.Messages,
    tools: chat.Tools = (),
    template: chat.ChatTemplate | None = None,
    variables: Mapping[str, object] | None = None,
) -> list[int]:
    """Ids of a prompt, as in training. An empty prompt becomes the bos token, or eos where the tokenizer has no bos.

    prompt: a text, or messages, which `template` or the tokenizer's chat template formats. tools: functions for the template.
    variables: further ones that the template reads.
    """
    tokens = chat.encode_prompt(tokenizer, prompt, tools, template, variables).tolist()
    if tokens:
        return tokens
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ConfigError("prompt is empty and the tokenizer has neither a bos nor an eos token: give a prompt")
    return [start]


def check_bias(config: GenerationConfig, vocab_size: int) -> None:
    """ConfigError if generation.logit_bias names an id outside the vocabulary of `vocab_size`."""
    unknown = next((token for token in config.logit_bias if token >= vocab_size), None)
    if unknown is not None:
        raise ConfigError(f"generation.logit_bias: token {unknown} is not one of the model's {vocab_size}")


def _check_rows(model: Model, rows: Sequence[Sequence[int]]) -> None:
    """ConfigError for a model that writes no text, an empty prompt, or an id beyond the vocabulary.

    Checked here because on a GPU an embedding index out of range ends the process with a device-side assertion.
    """
    if isinstance(model, Encoder):
        raise ConfigError("this model is an encoder: it reads text and writes none")
    if not all(rows):
        raise ConfigError("a prompt has no tokens: give each at least one")
    largest, size = max(max(row) for row in rows), model.config.vocab_size
    if largest >= size:
        raise ConfigError(f"the tokenizer gives token {largest}, the model knows {size}: they do not belong together")
