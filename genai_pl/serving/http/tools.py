"""Tool calls: tools for the chat template, and the calls parsed out of the generated text.

How a model writes a call is found from its chat template (`genai_pl/data/tool_calls.py`); one that shows none is taken
to write <tool_call>{"name": ..., "arguments": {...}}</tool_call>, the format of Hermes and Qwen models.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from genai_pl.data.tool_calls import Call, CallReader
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.responses import ChatFormat, Decode, Json
from genai_pl.serving.http.schemas import ChatBody
from genai_pl.serving.service import Service

if TYPE_CHECKING:
    from genai_pl.serving.engine.request import TokenOutput


def offered_tools(service: Service, body: ChatBody) -> list[Json]:
    """Tools for the chat template, none with tool_choice=none; ApiError 422 if the template cannot show tools."""
    if body.tool_choice not in (None, "none", "auto"):
        raise ApiError(422, "tool_choice: this server has none and auto", param="tool_choice")
    if not body.tools or body.tool_choice == "none":
        return []
    if "tools" not in str(service.tokenizer.chat_template):
        raise ApiError(422, "tools: the chat template of this model has no place for any", param="tools")
    tools = [tool.model_dump(exclude_unset=True) for tool in body.tools]
    try:
        json.dumps(tools, ensure_ascii=False).encode()
    except ValueError:
        raise ApiError(422, "tools: half of a surrogate pair is no text", param="tools") from None
    return tools


def openai_calls(calls: Sequence[Call], tools: Sequence[Json], new_id: Callable[[], str]) -> list[Json]:
    """Calls in OpenAI's shape; none if one cannot be read or names no offered tool: then all of the answer is text.

    >>> tools = [{"type": "function", "function": {"name": "add"}}]
    >>> openai_calls([Call("add", {"a": 1})], tools, lambda: "call_1")[0]["function"]
    {'name': 'add', 'arguments': '{"a": 1}'}
    """
    names = {tool["function"]["name"] for tool in tools}
    if any(call.error or call.name not in names for call in calls):
        return []
    functions = [{"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)} for call in calls]
    return [{"id": new_id(), "type": "function", "function": function} for function in functions]


class ToolChatFormat(ChatFormat):
    """Choices of a chat with tools; a stream has each answer in one delta, as a call is known only at its end.

    decode, logprobs: as for completions
    tools: offered tools, whose names calls may have
    reader: finds calls in answers of this model
    """

    streams_whole_answers = True

    def __init__(self, decode: Decode, logprobs: int | None, tools: Sequence[Json], reader: CallReader) -> None:
        super().__init__(decode, logprobs)
        self.tools, self.reader = tools, reader

    def choice(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """The choice of answer n, with its calls; the finish reason is tool_calls if there are any."""
        choice = super().choice(n, outputs, finish_reason)
        ids = [output.token for output in outputs]
        text, found = self.reader.read(choice["message"]["content"], ids, self.tools)
        if calls := openai_calls(found, self.tools, self.reader.call_id):
            choice["message"] |= {"content": text or None, "tool_calls": calls}
            choice["finish_reason"] = "tool_calls"
        return choice

    def whole_chunk(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """The choice of answer n as the one chunk of a stream."""
        choice = self.choice(n, outputs, finish_reason)
        delta = {k: v for k, v in choice.pop("message").items() if k != "refusal"}
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
        return {**choice, "delta": delta}
