"""Routes of this project: /generate, /score, and the state routes /health, /ready, /metrics and the chat page."""

from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from genai_pl.serving.answer_streams import Answer
from genai_pl.serving.errors import ApiError, documented, json_response
from genai_pl.serving.http.build_request import generation_config, submit_requests
from genai_pl.serving.http.schemas import GenerateAnswer, GenerateBody, ScoreAnswer, ScoreBody
from genai_pl.serving.http.streaming import Events, cancelled_at_exit, collect, merged, stream_events, while_connected
from genai_pl.serving.metrics import Metrics
from genai_pl.serving.service import Service

PAGE = Path(__file__).parents[1] / "static" / "index.html"
ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 503, 504)
# Content-Security-Policy: the page runs only its own inline script, and connects only to its own server
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def plain_routes(service: Service) -> APIRouter:
    """POST /generate and POST /score for one model."""
    router = APIRouter(responses=ERRORS, tags=["genai_pl"])

    @router.post("/generate", response_model=GenerateAnswer)
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Continue a text."""
        # settings
        body.refuse_unknown()
        adapter = service.adapter_of(body.adapter, "adapter")
        default = service.settings.defaults.max_new_tokens
        config = generation_config(
            service, body, max_tokens=body.max_new_tokens, param="max_new_tokens", stop=body.stop, default=default
        )
        # tokens and answer; a client that disconnects cancels either
        prompt = await while_connected(request.receive, service.tokens(body.prompt))
        answers = await submit_requests(service, body, [prompt], config, adapter=adapter)
        if body.stream:
            return await stream_events(request, generate_events(answers, len(prompt)))
        [outputs] = await while_connected(request.receive, collect(answers))
        text = "".join(output.text for output in outputs)
        whole = text if service.has_two_stacks else body.prompt + text
        return json_response({"response": whole, "text": text, **finish_fields(answers[0], len(prompt))})

    @router.post("/score", response_model=ScoreAnswer)
    async def score(body: ScoreBody, request: Request) -> Response:
        """Rewards of a reward model, or log-probabilities of a language model, for texts."""
        body.refuse_unknown()
        if len(body.texts) > service.limits.max_inputs:
            raise ApiError(
                422, f"text: {len(body.texts)} in one request, at most {service.limits.max_inputs}", param="text"
            )
        adapter = service.adapter_of(body.model)
        scored = await while_connected(request.receive, service.scorer.score(body.prompts, body.texts, adapter))
        kind = "reward" if service.is_reward else "log_probability"
        scores = [{"score": value, "n_tokens": n} for value, n in scored]
        return json_response({"model": body.model or service.name, "kind": kind, "scores": scores})

    return router


async def generate_events(answers: list[Answer], n_prompt: int) -> Events:
    """Events of a streamed /generate: {"text"} for each output with text, then one with finish reason and token counts."""
    async with cancelled_at_exit(answers), aclosing(merged(answers)) as outputs:
        async for _, output in outputs:
            if output.text:
                yield {"text": output.text}
    yield {"text": "", **finish_fields(answers[0], n_prompt)}


def finish_fields(answer: Answer, n_prompt: int) -> dict[str, object]:
    """Finish reason and token counts of an answer, as /generate has them."""
    return {"finish_reason": answer.finish_reason, "prompt_tokens": n_prompt, "generated_tokens": answer.n_generated}


def state_routes(metrics: Metrics, refresh: Callable[[], None], ready: Callable[[], bool]) -> APIRouter:
    """GET /health, /ready (and HEAD), /metrics and /, which need no key.

    refresh: sets the gauges before they are read
    ready: False before the model can answer and once the server stops
    """
    router = APIRouter(tags=["state"])

    # for orchestrators and load balancers
    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        """Liveness: the event loop answers."""
        return {"status": "ok"}

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", responses=documented(503))
    async def is_ready() -> dict[str, str]:
        """Readiness: the model can answer, for load balancers."""
        if not ready():
            raise ApiError(503, "not ready", headers={"Retry-After": "5"})
        return {"status": "ready"}

    # for Prometheus and browsers
    @router.get("/metrics", response_class=Response)
    async def numbers() -> Response:
        """Metrics in Prometheus's text format."""
        refresh()
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """A page to chat with the model."""
        return FileResponse(PAGE, media_type="text/html", headers={"content-security-policy": POLICY})

    return router
