"""What a client asked for becomes requests to the engine."""

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
from genai_pl.serving.http.schemas import Sampling
from genai_pl.serving.service import Service

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "logit_bias")


def generation_config(
    service: Service, body: Sampling, *, max_tokens: int | None, param: str, stop: Sequence[str], default: int | None
) -> GenerationConfig:
    """The server's way to choose tokens with what the client said instead; `default` tokens where it said none."""
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
    return replace(config, stop=[*config.stop, *stop])


def deadline(service: Service, body: Sampling) -> float:
    """When the answer must be there, on the monotonic clock."""
    limit = service.limits.timeout
    return time.monotonic() + min(limit, body.timeout or limit)


def check_count(service: Service, n: int, *, param: str) -> None:
    """ApiError for more answers at once than the server gives."""
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
    """n answers to each prompt, all or none; the draws of one seed differ from answer to answer."""
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
