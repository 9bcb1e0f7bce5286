"""Proxy routes: the same routes in front of an upstream server that speaks OpenAI's API.

Bodies are validated here and forwarded with every field the client set, known or not, so options of vLLM alone still work.
/generate is translated to /v1/completions and back; /score has no counterpart.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from genai_pl.serving.errors import ApiError, documented, json_response
from genai_pl.serving.http.label_schemas import ClassifyBody, PairScoreBody, RerankBody
from genai_pl.serving.http.schemas import (
    SAMPLING_FIELDS,
    Body,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    GenerateAnswer,
    GenerateBody,
    ScoreBody,
)
from genai_pl.serving.http.streaming import Events, stream_events, while_connected
from genai_pl.serving.http.upstream import Upstream
from genai_pl.serving.http.upstream_answers import (
    Json,
    list_of_models,
    list_of_objects,
    parse,
    text_of,
    token_count,
    upstream_errors,
)

ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 502, 503, 504)
# fields of /generate that /v1/completions has under the same name
PASSED = (*SAMPLING_FIELDS, "seed", "stop")


def proxy_routes(upstream: Upstream) -> APIRouter:
    """All routes but the state routes, answered by the upstream server."""
    router = APIRouter(responses=ERRORS)
    _add_openai_routes(router, upstream)
    _add_label_routes(router, upstream)
    _add_own_routes(router, upstream)
    return router


def _add_openai_routes(router: APIRouter, upstream: Upstream) -> None:
    @router.get("/v1/models", tags=["OpenAI"])
    async def models() -> Response:
        """The models of the upstream server."""
        return json_response(await upstream.get("models"))

    @router.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> Response:
        """One model by name."""
        for entry in list_of_models(await upstream.get("models")):
            if entry["id"] == name:
                return json_response(entry)
        raise ApiError(404, f"model={name}: not served there", param="model")

    @router.post("/v1/completions", tags=["OpenAI"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue one prompt or several."""
        return await forward(upstream, request, "completions", body, stream=body.stream)

    @router.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        return await forward(upstream, request, "chat/completions", body, stream=body.stream)

    @router.post("/v1/embeddings", tags=["OpenAI"])
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """Embeddings of texts."""
        return await forward(upstream, request, "embeddings", body, stream=False)


def _add_label_routes(router: APIRouter, upstream: Upstream) -> None:
    @router.post("/v2/rerank", tags=["labels"])
    @router.post("/v1/rerank", tags=["labels"])
    @router.post("/rerank", tags=["labels"])
    async def rerank(body: RerankBody, request: Request) -> Response:
        """Documents in the order of their relevance to a query."""
        return await forward(upstream, request, "rerank", body, stream=False)

    @router.post("/v1/score", tags=["labels"])
    async def score_pairs(body: PairScoreBody, request: Request) -> Response:
        """Relevance of each second text to its first."""
        return await forward(upstream, request, "score", body, stream=False)

    @router.post("/v1/classify", tags=["labels"])
    @router.post("/classify", tags=["labels"])
    async def classify(body: ClassifyBody) -> Response:
        """An error: OpenAI's API has no such route."""
        raise ApiError(400, "backend=openai gives no labels: OpenAI's API has no /classify; ask the server itself")


def _add_own_routes(router: APIRouter, upstream: Upstream) -> None:
    @router.post("/generate", response_model=GenerateAnswer, tags=["genai_pl"])
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Continue a text."""
        payload = await completion_payload(upstream, body)
        if body.stream:
            return await stream_events(request, generate_events(upstream, payload))
        reply = await while_connected(request.receive, upstream.post("completions", payload))
        return json_response(generate_answer(body.prompt, reply))

    @router.post("/score", tags=["genai_pl"])
    async def score(body: ScoreBody) -> Response:
        """An error: OpenAI's API has no such route."""
        raise ApiError(400, "backend=openai gives no scores: OpenAI's API has none")


async def forward(upstream: Upstream, request: Request, path: str, body: Body, *, stream: bool) -> Response:
    """The upstream server's answer to the body, as one JSON object or as a stream of events."""
    try:
        payload = {k: v for k, v in body.model_dump(mode="json", exclude_unset=True).items() if k != "timeout"}
        json.dumps(payload, allow_nan=False)
    except (ValueError, RecursionError):
        raise ApiError(422, "the body has a value that JSON has no words for") from None
    payload["model"] = payload.get("model") or await upstream.default_model()
    if stream:
        return await stream_events(request, upstream.stream(path, payload))
    return json_response(await while_connected(request.receive, upstream.post(path, payload)))


async def completion_payload(upstream: Upstream, body: GenerateBody) -> Json:
    """The body of /v1/completions for a body of /generate."""
    options_set = {name: getattr(body, name) for name in PASSED if getattr(body, name) not in (None, [])}
    n = body.max_new_tokens or min(upstream.limits.max_tokens, upstream.settings.defaults.max_new_tokens)
    model = body.adapter or await upstream.default_model()
    options = {"stream": True, "stream_options": {"include_usage": True}} if body.stream else {}
    return {"model": model, "prompt": body.prompt, "max_tokens": n, **options_set, **options}


def generate_answer(prompt: str, reply: Json) -> Json:
    """The answer of /generate from one of /v1/completions; ApiError 502 if the reply has not that shape."""
    with upstream_errors():
        [choice] = list_of_objects(reply, "choices")
        text, reason = text_of(choice["text"]), text_of(choice["finish_reason"])
        return {"response": prompt + text, "text": text, "finish_reason": reason, **_usage_fields(reply.get("usage"))}


async def generate_events(upstream: Upstream, payload: Json) -> Events:
    """Events of a streamed /generate from those of /v1/completions; the token counts come with the last one."""
    reason, costs = "stop", None
    events: AsyncGenerator[str, None] = upstream.stream("completions", payload)
    async with aclosing(events):
        async for event in events:
            chunk = parse(event)
            costs = chunk.get("usage") or costs
            with upstream_errors():
                choices = list_of_objects(chunk, "choices")
                texts = [text_of(choice.get("text") or "") for choice in choices]
                reason = next((text_of(c["finish_reason"]) for c in choices if c.get("finish_reason")), reason)
            for text in filter(None, texts):
                yield {"text": text}
    with upstream_errors():
        counts = _usage_fields(costs)
    yield {"text": "", "finish_reason": reason, **counts}


def _usage_fields(costs: object) -> dict[str, int]:
    return {
        "prompt_tokens": token_count(costs, "prompt_tokens"),
        "generated_tokens": token_count(costs, "completion_tokens"),
    }
