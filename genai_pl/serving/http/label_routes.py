"""Routes of classifiers and rerankers: /classify and /v1/score as vLLM has them, /rerank as Jina and vLLM have it."""

import time
import uuid

from fastapi import APIRouter, Request
from fastapi.responses import Response

from genai_pl.serving.errors import ApiError, documented, json_response
from genai_pl.serving.http.label_schemas import (
    ClassifyAnswer,
    ClassifyBody,
    PairScoreAnswer,
    PairScoreBody,
    RerankAnswer,
    RerankBody,
)
from genai_pl.serving.http.streaming import while_connected
from genai_pl.serving.service import Service

ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 503, 504)


def label_routes(service: Service) -> APIRouter:
    """POST /classify and POST /rerank for one model, also under /v1, /v2/rerank, and POST /v1/score."""
    router = APIRouter(responses=ERRORS, tags=["labels"])

    @router.post("/v1/classify", response_model=ClassifyAnswer)
    @router.post("/classify", response_model=ClassifyAnswer)
    async def classify(body: ClassifyBody, request: Request) -> Response:
        """Labels of texts, with the probability of each."""
        body.refuse_unknown()
        _check_count(service, len(body.items), "input")
        adapter = service.adapter_of(body.model)
        labelled = service.labeller.classify(body.items, body.pairs, adapter)
        probs, n_tokens = await while_connected(request.receive, labelled)
        names = service.labels.names
        data = [
            {"index": n, "label": names[row.argmax()], "probs": row.tolist(), "num_classes": len(names)}
            for n, row in enumerate(probs)
        ]
        head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        model = body.model or service.name
        return json_response({**head, "model": model, "data": data, "usage": _usage(n_tokens)})

    @router.post("/v2/rerank", response_model=RerankAnswer)
    @router.post("/v1/rerank", response_model=RerankAnswer)
    @router.post("/rerank", response_model=RerankAnswer)
    async def rerank(body: RerankBody, request: Request) -> Response:
        """Documents in the order of their relevance to a query."""
        body.refuse_unknown()
        texts = body.texts
        _check_count(service, len(texts), "documents")
        adapter = service.adapter_of(body.model)
        relevance = service.labeller.relevance([body.query] * len(texts), texts, adapter)
        scores, n_tokens = await while_connected(request.receive, relevance)
        order = scores.argsort(descending=True, stable=True).tolist()[: body.top_n or None]
        results = [{"index": n, "relevance_score": scores[n].item()} for n in order]
        if body.return_documents:
            results = [{**entry, "document": {"text": texts[entry["index"]]}} for entry in results]
        head = {"id": f"rerank-{uuid.uuid4().hex}", "model": body.model or service.name}
        return json_response({**head, "usage": _usage(n_tokens), "results": results})

    @router.post("/v1/score", response_model=PairScoreAnswer)
    async def score_pairs(body: PairScoreBody, request: Request) -> Response:
        """Relevance of each second text to its first, in the order of the request."""
        body.refuse_unknown()
        first, second = body.pairs
        _check_count(service, len(second), "text_2")
        relevance = service.labeller.relevance(first, second, service.adapter_of(body.model))
        scores, n_tokens = await while_connected(request.receive, relevance)
        data = [{"index": n, "object": "score", "score": score} for n, score in enumerate(scores.tolist())]
        head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        model = body.model or service.name
        return json_response({**head, "model": model, "data": data, "usage": _usage(n_tokens)})

    return router


def _check_count(service: Service, n: int, param: str) -> None:
    """ApiError 422 for more texts than a request may have."""
    if n > service.limits.max_inputs:
        raise ApiError(422, f"{param}: {n} in one request, at most {service.limits.max_inputs}", param=param)


def _usage(n_tokens: int) -> dict[str, int]:
    return {"prompt_tokens": n_tokens, "total_tokens": n_tokens, "completion_tokens": 0}
