"""Items of OpenAI's Responses API: thoughts, the message, calls of functions."""

import uuid

from genai_pl.serving.http.one_answer import Finished
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
