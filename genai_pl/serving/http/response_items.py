"""Items of OpenAI's Responses API: thoughts, the message, calls of functions."""

import uuid
from collections.abc import Sequence

from genai_pl.serving.http.one_answer import Finished
from genai_pl.serving.http.response_schemas import Item
from genai_pl.serving.http.responses import Json


def items(finished: Finished) -> list[Json]:
    """The output: thoughts, a message, calls."""
    status = "incomplete" if finished.finish_reason == "length" else "completed"
    output = []
    if finished.reasoning:
        output.append(reasoning_item(finished.reasoning, status))
    if finished.text or not (finished.reasoning or finished.calls):
        output.append(message_item(finished.text, status))
    return output + [call_item(call, "completed") for call in finished.calls]


def input_items(given: str | Sequence[Item]) -> list[Json]:
    """The items of an input with ids, their texts as parts, as they are listed later."""
    if isinstance(given, str):
        given = [Item(role="user", content=given)]
    return [_input_item(item) for item in given]


def _input_item(item: Item) -> Json:
    """One item of an input; it keeps the id that the client gave it."""
    fields = item.model_dump(exclude_none=True)
    prefix = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}[item.type]
    listed = {"id": new_id(prefix), "status": "completed", **fields}
    if item.type == "message":
        kind = "output_text" if item.role == "assistant" else "input_text"
        texts = [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
        listed["content"] = [text_part(t) if kind == "output_text" else {"type": kind, "text": t} for t in texts]
    if item.type == "reasoning":
        listed.setdefault("summary", [])
    return listed


def reasoning_item(text: str | None, status: str) -> Json:
    """The item of thoughts; None: none are known yet."""
    content = [] if text is None else [{"type": "reasoning_text", "text": text}]
    return {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": content, "status": status}


def message_item(text: str | None, status: str) -> Json:
    """The item of the answer's text; None: none is known yet."""
    content = [] if text is None else [text_part(text)]
    return {"id": new_id("msg"), "type": "message", "role": "assistant", "content": content, "status": status}


def text_part(text: str) -> Json:
    """A part of a message's content."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(call: Json, status: str) -> Json:
    """The item of a call."""
    return {
        "id": new_id("fc"),
        "type": "function_call",
        "call_id": call["id"],
        **call["function"],
        "status": status,
    }


def new_id(prefix: str) -> str:
    """A new id of an item."""
    return f"{prefix}_{uuid.uuid4().hex}"
