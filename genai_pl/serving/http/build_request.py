"""Request building: sampling settings, deadline and seeds of a body become requests to the engine."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.generation import check_bias
from genai_pl.serving.answer_streams import Answer
from genai_pl.serving.engine.request import Request
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.schemas import SAMPLING_FIELDS, OpenAISampling, Sampling
from genai_pl.serving.service import Service


def generation_config(
    service: Service,
    body: Sampling,
    *,
    max_tokens: int | None,
    param: str,
    stop: Sequence[str],
    default: int | None,
    ends: Sequence[str] = (),
) -> GenerationConfig:
    """The server's sampling settings, overridden by those of the body.

    max_tokens, param: the body's limit of new tokens, and the field that has it
    stop: stop strings, added to the server's
    ends: further ones, of the form of the prompt
    default: new tokens if the body sets none; None for the server's limit
    Raises ApiError 422 for more tokens than the server generates, or a logit_bias outside the vocabulary.
    """
    limit = service.limits.max_tokens
    if max_tokens is not None and max_tokens > limit:
        raise ApiError(422, f"{param}={max_tokens}: this server gives at most {limit}", param=param)
    overrides = {name: getattr(body, name) for name in SAMPLING_FIELDS if getattr(body, name) is not None}
    n = max_tokens or min(limit, default or limit)
    config = replace(service.settings.defaults, **overrides, max_new_tokens=n)
    if body.logit_bias is not None:
        try:
            check_bias(config, service.model.config.vocab_size)
        except ConfigError as error:
            raise ApiError(422, str(error).removeprefix("generation."), param="logit_bias") from None
    return replace(config, stop=[*config.stop, *stop, *ends])


def with_least_tokens(config: GenerationConfig, body: OpenAISampling) -> GenerationConfig:
    """The config without end tokens in the first min_tokens, or in all of the answer with ignore_eos; ApiError 422 for too many.

    A stop string ends an answer nevertheless. End tokens are left out, as in llama.cpp, where vLLM would draw one and go on.
    """
    least = config.max_new_tokens if body.ignore_eos else body.min_tokens
    if least is None:
        return config
    if least > config.max_new_tokens:
        most = f"an answer to this request has at most {config.max_new_tokens}"
        raise ApiError(422, f"min_tokens={least}: {most}", param="min_tokens")
    return replace(config, min_new_tokens=least)


def deadline(service: Service, body: Sampling) -> float:
    """Time on time.monotonic() at which the answer ends: the server's timeout, or a shorter one of the body."""
    limit = service.limits.timeout
    return time.monotonic() + min(limit, body.timeout or limit)


def check_count(service: Service, n: int, *, param: str) -> None:
    """Raise ApiError 422 for more answers than one request may have."""
    if n > service.limits.max_n:
        raise ApiError(422, f"{param}: {n} answers in one request, at most {service.limits.max_n}", param=param)


async def submit_requests(
    service: Service,
    body: Sampling,
    prompts: Sequence[tuple[int, ...]],
    config: GenerationConfig,
    *,
    adapter: str | None,
    n: int = 1,
    logprobs: int | None = None,
) -> list[Answer]:
    """n answers to each prompt, in the order of prompts; all or, if one cannot be queued, none.

    adapter: of all of them, None for the base
    logprobs: n likeliest tokens to report, None for no log-probabilities

    Answer k of a prompt has the seed of the body plus k, so that one seed gives different answers, the same each time. All
    share one group and one deadline.
    """
    until = deadline(service, body)
    answers: list[Answer] = []
    group = object()
    try:
        for tokens in prompts:
            for k in range(n):
                seed = None if body.seed is None else body.seed + k
                request = Request(tokens, config, seed, adapter, logprobs, until, group=group)
                answers.append(await service.answer(request))
    except BaseException:
        for answer in answers:
            with suppress(Exception):
                answer.cancel()
        raise
    return answers
