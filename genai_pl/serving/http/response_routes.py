"""OpenAI's Responses API: /v1/responses, in front of the same chat as chat completions."""

import time
import uuid
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from genai_pl.serving.errors import ApiError, documented, json_response
from genai_pl.serving.http.messages import CalledFunction, Message, ToolCall
from genai_pl.serving.http.one_answer import Finished, OneAnswer, renamed
from genai_pl.serving.http.openai import read_chat
from genai_pl.serving.http.response_events import response_events
from genai_pl.serving.http.response_items import input_items, items
from genai_pl.serving.http.response_memory import ResponseMemory
from genai_pl.serving.http.response_schemas import ResponsesBody
from genai_pl.serving.http.responses import Json
from genai_pl.serving.http.streaming import stream_events
from genai_pl.serving.service import Service

NAMES = {  # what this API calls fields of chat completions
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "reasoning_effort": "reasoning.effort",
}
ERRORS = documented(400, 401, 404, 408, 413, 422, 429, 500, 503, 504)


def response_routes(service: Service) -> APIRouter:
    """POST /v1/responses, and what is below /v1/responses/ID, for one model and its adapters."""
    router = APIRouter(prefix="/v1/responses", responses=ERRORS, tags=["OpenAI"])
    memory = ResponseMemory(int(service.limits.stored_mib * 2**20))

    def before(body: ResponsesBody) -> tuple[list[Message], list[Json]]:
        """The conversation that the body continues, as messages and as items."""
        if body.previous_response_id is None:
            return [], []
        previous = memory.get(body.previous_response_id, "previous_response_id")
        return previous.messages, [*previous.items, *previous.response["output"]]

    @router.post("")
    async def respond(body: ResponsesBody, request: Request) -> Response:
        """Answer an input, perhaps after an earlier response, with items: thoughts, a message, calls of functions."""
        body.refuse_unknown()
        earlier, earlier_items = before(body)
        answer = await OneAnswer.start(service, body.as_chat(earlier), request, NAMES)
        head = response_head(body, body.model or service.name)

        def finish(output: list[Json]) -> Json:
            """The complete response, stored if the body allows it."""
            finished = answer.finished
            response = {**head, **stop_fields(finished), "output": output, "usage": usage(answer, finished)}
            if body.store:
                messages = [*earlier, *body.messages(), assistant_turn(finished)]
                memory.put(response, messages, [*earlier_items, *input_items(body.input)])
            return response

        if body.stream:
            return await stream_events(request, response_events(answer, head, finish), is_named=True)
        return json_response(finish(items(await answer.whole(request))))

    @router.post("/input_tokens")
    async def input_tokens(body: ResponsesBody, request: Request) -> Response:
        """Tokens of the conversation that such a response would answer, as the model would read it."""
        body.refuse_unknown()
        with renamed(NAMES):
            prompt, _, _ = await read_chat(service, body.as_chat(before(body)[0]), request)
        return json_response({"object": "response.input_tokens", "input_tokens": len(prompt)})

    @router.get("/{name}")
    async def stored(name: str) -> Response:
        """A stored response."""
        return json_response(memory.get(name).response)

    @router.get("/{name}/input_items")
    async def listed(
        name: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """The items that a stored response answers, those of earlier responses included, a page at a time."""
        return json_response(page(memory.get(name).items, limit=limit, newest_first=order == "desc", after=after))

    @router.post("/{name}/cancel")
    async def cancel(name: str) -> Response:
        """Refused: only a response in the background can be cancelled, and here none runs there."""
        memory.get(name)
        raise ApiError(400, f"{name[:80]} was not made with background=true: only such a response can be cancelled")

    @router.delete("/{name}")
    async def delete(name: str) -> Response:
        """Forget a stored response."""
        memory.delete(name)
        return json_response({"id": name, "object": "response", "deleted": True})

    return router


def page(items: list[Json], *, limit: int, newest_first: bool, after: str | None) -> Json:
    """At most `limit` of the items, those that follow the one with the id `after`; ApiError 404 if there is none."""
    items = items[::-1] if newest_first else items
    if after is not None:
        places = [n for n, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ApiError(404, f"after={after[:80]}: no item of this response has the id", param="after")
        items = items[places[0] + 1 :]
    found = items[:limit]
    ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]} if found else {"first_id": None, "last_id": None}
    return {"object": "list", "data": found, **ends, "has_more": len(items) > limit}


def response_head(body: ResponsesBody, model: str) -> Json:
    """The fields of a response that are known before its answer."""
    given = body.model_dump(include={"instructions", "previous_response_id", "store", "temperature", "top_p"})
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        **given,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "output": [],
        "parallel_tool_calls": True if body.parallel_tool_calls is None else body.parallel_tool_calls,
        "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "tool_choice": choice or "auto",
        "tools": [tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
        "truncation": "disabled",
        "usage": None,
    }


def stop_fields(finished: Finished) -> Json:
    """status and incomplete_details of a complete answer."""
    if finished.finish_reason == "length":
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"status": "completed"}


def usage(answer: OneAnswer, finished: Finished) -> Json:
    """Token counts of a response."""
    return {
        "input_tokens": answer.n_prompt,
        "input_tokens_details": {"cached_tokens": answer.n_cached},
        "output_tokens": answer.n_generated,
        "output_tokens_details": {"reasoning_tokens": finished.n_reasoning},
        "total_tokens": answer.n_prompt + answer.n_generated,
    }


def assistant_turn(finished: Finished) -> Message:
    """The answer as a message of the conversation."""
    calls = [ToolCall(id=call["id"], function=CalledFunction(**call["function"])) for call in finished.calls]
    thoughts = finished.reasoning or None
    return Message(role="assistant", content=finished.text, tool_calls=calls or None, reasoning_content=thoughts)
