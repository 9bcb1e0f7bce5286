"""OpenAI's routes: /v1/models, /v1/completions, /v1/chat/completions and /v1/embeddings.

Requests and answers follow OpenAI's API reference, with vLLM's extra fields (top_k, min_p, repetition_penalty, guided_json, ...).
Completions and chat share `respond`; an AnswerFormat of responses.py writes the JSON of either.
"""

import asyncio
import base64
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from fastapi.responses import Response
from torch import Tensor

from genai_pl.serving.answer_streams import Answer
from genai_pl.serving.errors import ApiError, documented
from genai_pl.serving.http.build_request import check_count, generation_config, submit_requests, with_least_tokens
from genai_pl.serving.http.echo import completion_prompts, echoed
from genai_pl.serving.http.rendering import json_answer, json_chunks
from genai_pl.serving.http.responses import AnswerFormat, ChatFormat, CompletionFormat, header, usage
from genai_pl.serving.http.schemas import ChatBody, CompletionBody, EmbeddingBody, OpenAISampling
from genai_pl.serving.http.streaming import Events, cancelled_at_exit, collect, merged, stream_events, while_connected
from genai_pl.serving.http.structured import apply_response_format
from genai_pl.serving.http.template_variables import template_variables
from genai_pl.serving.http.tools import ForcedCallFormat, ToolChatFormat, is_forced, offered_tools
from genai_pl.serving.service import Service

if TYPE_CHECKING:
    from genai_pl.serving.engine.request import TokenOutput

ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 503, 504)


def openai_routes(service: Service) -> APIRouter:
    """OpenAI's routes for one model and its adapters."""
    router = APIRouter(prefix="/v1", responses=ERRORS, tags=["OpenAI"])

    @router.get("/models")
    async def models() -> dict:
        """The model and its adapters."""
        return {"object": "list", "data": [model_entry(service, name) for name in service.names]}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict:
        """One model by name."""
        service.adapter_of(name)
        return model_entry(service, name)

    @router.post("/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        check(service, body, len(body.prompts))
        prompts, ends = await while_connected(request.receive, completion_prompts(service, body))
        names = decoder(service, as_ids=body.return_tokens_as_token_ids)
        answer_format = CompletionFormat(names, body.logprobs)
        if body.echo:
            adapter = service.adapter_of(body.model)
            echoes = await while_connected(request.receive, echoed(service, body, prompts, adapter))
            answer_format = CompletionFormat(names, body.logprobs, echoes, n_each=body.n)
        token_limit = {"max_tokens": body.max_tokens, "param": "max_tokens", "default": 16, "ends": ends}  # OpenAI's 16
        if body.max_tokens == 0:  # echo alone: no answer
            return await whole_answer(
                answer_format, body.model or service.name, prompts, [None] * len(prompts) * body.n
            )
        return await respond(service, body, request, prompts, answer_format, token_limit)

    @router.post("/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        prompt, answer_format, token_limit = await read_chat(service, body, request)
        return await respond(service, body, request, [prompt], answer_format, token_limit)

    @router.post("/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """Embeddings of texts, of length 1."""
        body.refuse_unknown()
        return await while_connected(request.receive, embed(service, body))

    return router


def check(service: Service, body: OpenAISampling, n_prompts: int) -> None:
    """Raise ApiError for unknown options, an unknown model or too many answers, before any text is tokenized."""
    body.refuse_unknown()
    service.adapter_of(body.model)
    check_count(service, n_prompts * body.n, param="n" if body.n > 1 else "prompt")


def model_entry(service: Service, name: str) -> dict[str, object]:
    """The entry of a model or adapter; max_model_len and parent are vLLM's fields."""
    root = None if name == service.name else service.name
    adapter = None if root is None else service.adapters.find(name)
    created = service.started if adapter is None else adapter.since
    entry = {"id": name, "object": "model", "created": created, "owned_by": "genai_pl"}
    return {**entry, "max_model_len": service.context, "parent": root}


def decoder(service: Service, *, as_ids: bool = False):
    """A function from token id to text, for log-probabilities; to token_id:N, which no two tokens share, where as_ids."""
    if as_ids:
        return lambda token: f"token_id:{token}"
    return lambda token: service.tokenizer.decode([token], skip_special_tokens=False)


async def read_chat(
    service: Service, body: ChatBody, request: Request
) -> tuple[tuple[int, ...], ChatFormat, dict[str, object]]:
    """(tokens of the conversation, format of the answers, arguments of generation_config) of a chat."""
    check(service, body, 1)
    tools = offered_tools(service, body)
    turns = [message.plain() for message in body.messages]
    work = service.chat_tokens(turns, tools, template_variables(service, body))
    prompt = await while_connected(request.receive, work)
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    token_limit = {"max_tokens": getattr(body, param), "param": param, "default": None}
    top = (body.top_logprobs or 0) if body.logprobs else None
    options = {"make_splitter": partial(service.reasoning.make, prompt)}
    if not tools:
        return prompt, ChatFormat(decoder(service), top, **options), token_limit
    reader = await asyncio.to_thread(lambda: service.call_reader)
    if is_forced(body):
        return prompt, ForcedCallFormat(decoder(service), top, tools, reader), token_limit
    return prompt, ToolChatFormat(decoder(service), top, tools, reader, **options), token_limit


async def submit(
    service: Service,
    body: OpenAISampling,
    request: Request,
    prompts: list[tuple[int, ...]],
    answer_format: AnswerFormat,
    token_limit: dict[str, object],
) -> list[Answer]:
    """n answers to each prompt, queued; arguments as for `respond`."""
    config = with_least_tokens(generation_config(service, body, stop=body.stops, **token_limit), body)
    config = await while_connected(request.receive, apply_response_format(service, body, config))
    options = {"adapter": service.adapter_of(body.model), "n": body.n, "logprobs": answer_format.logprobs}
    return await submit_requests(service, body, prompts, config, **options)


async def respond(
    service: Service,
    body: OpenAISampling,
    request: Request,
    prompts: list[tuple[int, ...]],
    answer_format: AnswerFormat,
    token_limit: dict[str, object],
) -> Response:
    """The HTTP answer: n answers to each prompt as one JSON object, or as a stream if the body asks for it.

    prompts: token ids
    answer_format: writes the JSON of completions or chat
    token_limit: the arguments max_tokens, param, default and ends of generation_config
    """
    answers = await submit(service, body, request, prompts, answer_format, token_limit)
    n_prompt, name = sum(map(len, prompts)), body.model or service.name
    # stream
    if body.stream:
        make_events = whole_chunks if answer_format.streams_whole_answers else chunks
        events = make_events(
            answers,
            answer_format,
            header(answer_format.chunk_kind, name),
            n_prompt,
            n_each=body.n,
            with_usage=body.with_usage,
        )
        return await stream_events(request, events)
    # or collect
    outputs = await while_connected(request.receive, collect(answers))
    return await whole_answer(answer_format, name, prompts, answers, outputs)


async def whole_answer(
    answer_format: AnswerFormat,
    name: str,
    prompts: list[tuple[int, ...]],
    answers: "list[Answer] | list[None]",
    outputs: "list[list[TokenOutput]] | None" = None,
) -> Response:
    """The JSON object of all answers; None stands for an answer without tokens."""
    outputs = outputs or [[] for _ in answers]

    def whole() -> dict[str, object]:
        reasons = ["length" if answer is None else answer.finish_reason for answer in answers]
        choices = (answer_format.choice(n, found, reasons[n]) for n, found in enumerate(outputs))
        written = [answer for answer in answers if answer is not None]
        counts = usage(sum(map(len, prompts)), written, n_each=len(answers) // len(prompts))
        return {**header(answer_format.kind, name), "choices": choices, "usage": counts}

    return await json_answer(whole)


async def chunks(
    answers: list[Answer], answer_format: AnswerFormat, head: dict, n_prompt: int, *, n_each: int, with_usage: bool
) -> Events:
    """Events of a stream: the first chunk of each answer, one for each output, the last ones, and with_usage the token counts.

    Without log-probabilities, outputs without text (half a character, a possible stop string or marker) have no event.
    """
    rest = {"usage": None} if with_usage else {}
    opened: set[int] = set()

    def first_chunk(n: int) -> list[dict]:
        first = None if n in opened else answer_format.first_chunk(n)
        opened.add(n)
        return [] if first is None else [{**head, "choices": [first], **rest}]

    # outputs as they come, from any of the answers
    async with cancelled_at_exit(answers), aclosing(merged(answers)) as outputs:
        async for n, output in outputs:
            for event in first_chunk(n):
                yield event
            if (choice := answer_format.chunk(n, output)) is not None:
                yield {**head, "choices": [choice], **rest}
    # finish reasons, once all have ended
    for n, answer in enumerate(answers):
        for event in first_chunk(n):
            yield event
        yield {**head, "choices": [answer_format.last_chunk(n, answer.finish_reason)], **rest}
    if with_usage:
        yield {**head, "choices": [], "usage": usage(n_prompt, answers, n_each)}


async def whole_chunks(
    answers: list[Answer], answer_format: ToolChatFormat, head: dict, n_prompt: int, *, n_each: int, with_usage: bool
) -> Events:
    """Events of a stream that has each answer in one chunk, once all are finished: a tool call shows only at its end."""
    rest = {"usage": None} if with_usage else {}
    for n, outputs in enumerate(await collect(answers)):
        chunk = await asyncio.to_thread(answer_format.whole_chunk, n, outputs, answers[n].finish_reason)
        event = await asyncio.to_thread(json_chunks, {**head, "choices": [chunk], **rest}, in_ascii=True)
        yield b"".join(event).decode()
    if with_usage:
        yield {**head, "choices": [], "usage": usage(n_prompt, answers, n_each)}


async def embed(service: Service, body: EmbeddingBody) -> Response:
    """The answer of /v1/embeddings; `dimensions` keeps the first numbers of each vector and normalizes again."""
    inputs = body.inputs
    if len(inputs) > service.limits.max_inputs:
        raise ApiError(
            422, f"input: {len(inputs)} texts in one request, at most {service.limits.max_inputs}", param="input"
        )
    # vectors, cut and normalized again if the body asks for fewer dimensions
    vectors, n_tokens = await service.scorer.embed(inputs, service.adapter_of(body.model))
    if body.dimensions is not None:
        if body.dimensions > vectors.shape[1]:
            raise ApiError(
                422, f"dimensions={body.dimensions}: the vectors have {vectors.shape[1]}", param="dimensions"
            )
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)

    # JSON, written in a thread: up to max_inputs vectors of some thousand numbers
    def number(vector: Tensor) -> str | list[float]:
        if body.encoding_format == "base64":
            return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
        return vector.tolist()

    def whole() -> dict[str, object]:
        data = ({"object": "embedding", "index": n, "embedding": number(vector)} for n, vector in enumerate(vectors))
        costs = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": body.model or service.name, "usage": costs}

    return await json_answer(whole)
