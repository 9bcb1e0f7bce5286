"""Anthropic's routes: /v1/messages and /v1/messages/count_tokens, in front of the same chat as OpenAI's."""

import uuid
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from genai_pl.serving.errors import ApiError, as_api_error, json_response
from genai_pl.serving.http.anthropic_schemas import CountBody, MessagesBody
from genai_pl.serving.http.one_answer import Finished, OneAnswer, arguments_of, renamed
from genai_pl.serving.http.openai import read_chat
from genai_pl.serving.http.responses import Json
from genai_pl.serving.http.schemas import ChatBody
from genai_pl.serving.http.streaming import Events, stream_events
from genai_pl.serving.http.template_variables import thinking_variables
from genai_pl.serving.service import Service

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
NAMES = {  # what this API calls fields of chat completions
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "stop": "stop_sequences",
}


def anthropic_routes(service: Service) -> APIRouter:
    """POST /v1/messages and POST /v1/messages/count_tokens for one model and its adapters."""
    router = APIRouter(prefix="/v1", tags=["Anthropic"])

    @router.post("/messages")
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation with blocks of text, calls of tools and, if asked for, thoughts."""
        body.refuse_unknown()
        if body.shows_thoughts and not service.reasoning.is_known:
            raise ApiError(422, "thinking: the chat template of this model has no thoughts", param="thinking")
        answer = await OneAnswer.start(service, as_chat(service, body), request, NAMES)
        head = {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": body.model}
        if body.stream:
            return await stream_events(request, message_events(answer, head, body.shows_thoughts), is_named=True)
        finished = await answer.whole(request)
        content = blocks(finished, body.shows_thoughts)
        return json_response({**head, "content": content, **stop_fields(finished), "usage": usage(answer)})

    @router.post("/messages/count_tokens")
    async def count_tokens(body: CountBody, request: Request) -> Response:
        """Tokens of a conversation, as the model would read it."""
        body.refuse_unknown()
        with renamed(NAMES):
            prompt, _, _ = await read_chat(service, as_chat(service, body), request)
        return json_response({"input_tokens": len(prompt)})

    return router


def as_chat(service: Service, body: CountBody) -> ChatBody:
    """The conversation as a body of chat completions, with thoughts on or off where the request and the chat template say so."""
    variables = {} if body.thinking is None else thinking_variables(service, thinks=body.shows_thoughts)
    return body.chat(chat_template_kwargs=variables or None)


def blocks(finished: Finished, shows_thoughts: bool) -> list[Json]:
    """The content of a message: thoughts, text, calls."""
    content: list[Json] = []
    if finished.reasoning and shows_thoughts:
        content.append({"type": "thinking", "thinking": finished.reasoning, "signature": ""})
    if finished.text:
        content.append({"type": "text", "text": finished.text})
    return content + [tool_use(call, arguments_of(call)) for call in finished.calls]


def tool_use(call: Json, arguments: Json) -> Json:
    """The block of a call."""
    return {"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments}


def stop_fields(finished: Finished) -> Json:
    """stop_reason and stop_sequence."""
    reason = REASONS[finished.finish_reason] if finished.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": finished.stop}


def usage(answer: OneAnswer) -> Json:
    """Token counts of a message; input_tokens leaves out those that the prefix cache had, as Anthropic's does."""
    return {
        "input_tokens": answer.n_prompt - answer.n_cached,
        "cache_creation_input_tokens": 0,  # tokens written to the cache cost no more here
        "cache_read_input_tokens": answer.n_cached,
        "output_tokens": answer.n_generated,
    }


async def message_events(answer: OneAnswer, head: Json, shows_thoughts: bool) -> Events:
    """Events of a streamed message; the first one comes with the first piece, so that an error before it has its own status."""
    async with aclosing(answer.split_text()) as found:
        first = await anext(found)
        start = {**head, "content": [], "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": {**start, "usage": {**usage(answer), "output_tokens": 0}}}
        try:
            # thoughts and text, each in a block that opens with its first piece
            index, kind = -1, ""
            split_text = first
            while split_text is not None:
                sides = (("thinking", split_text.reasoning if shows_thoughts else ""), ("text", split_text.text))
                for name, text in sides:
                    if text and name != kind:
                        if kind:
                            yield {"type": "content_block_stop", "index": index}
                        index, kind = index + 1, name
                        empty = {"type": name, name: "", **({"signature": ""} if name == "thinking" else {})}
                        yield {"type": "content_block_start", "index": index, "content_block": empty}
                    if text:
                        delta = {"type": f"{name}_delta", name: text}
                        yield {"type": "content_block_delta", "index": index, "delta": delta}
                split_text = await anext(found, None)
            if kind:
                yield {"type": "content_block_stop", "index": index}
            # calls, and the end
            for n, call in enumerate(answer.finished.calls, index + 1):
                yield {"type": "content_block_start", "index": n, "content_block": tool_use(call, {})}
                delta = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
                yield {"type": "content_block_delta", "index": n, "delta": delta}
                yield {"type": "content_block_stop", "index": n}
            yield {"type": "message_delta", "delta": stop_fields(answer.finished), "usage": usage(answer)}
            yield {"type": "message_stop"}
        except Exception as error:
            yield as_api_error(error).body()
