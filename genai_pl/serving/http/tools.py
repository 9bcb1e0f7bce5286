"""Tool calls: tools for the chat template, and the calls parsed out of the generated text.

A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>, the format of Hermes and Qwen models.
"""

import json
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.responses import ChatFormat, Decode, Json
from genai_pl.serving.http.schemas import ChatBody
from genai_pl.serving.service import Service

if TYPE_CHECKING:
    from genai_pl.serving.engine.request import TokenOutput

OPENING, CLOSING = "<tool_call>", "</tool_call>"


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


def parse_tool_calls(text: str, names: Collection[str]) -> tuple[str, list[Json]]:
    """(text outside of calls, calls in OpenAI's shape).

    names: of the tools that were offered
    If one call is no JSON or names no offered tool, all of the text stays text and there are no calls.

    >>> text, [call] = parse_tool_calls('Wait. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', {"add"})
    >>> text, call["function"]
    ('Wait.', {'name': 'add', 'arguments': '{"a": 1}'})
    """
    calls, outside, end = [], [], 0
    for begin, after in tool_call_spans(text):
        source = text[begin + len(OPENING) : after - len(CLOSING)].strip()
        outside.append(text[end:begin])
        end = after
        try:
            call = json.loads(source)
            name, arguments = call["name"], call.get("arguments", {})
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return text, []
        if name not in names or not isinstance(arguments, dict):
            return text, []
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
    return ("".join([*outside, text[end:]]).strip() if calls else text), calls


def tool_call_spans(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each call in the text, markers included; linear in the text, whatever markers it has."""
    end = 0
    while (begin := text.find(OPENING, end)) >= 0:
        closing = text.find(CLOSING, begin + len(OPENING))
        if closing < 0:
            return
        end = closing + len(CLOSING)
        yield begin, end


class ToolChatFormat(ChatFormat):
    """Choices of a chat with tools; a stream has each answer in one delta, as a call is known only at its end.

    decode, logprobs: as for completions
    tools: offered tools, whose names calls may have
    """

    streams_whole_answers = True

    def __init__(self, decode: Decode, logprobs: int | None, tools: Sequence[Json]) -> None:
        super().__init__(decode, logprobs)
        self.names = {tool["function"]["name"] for tool in tools}

    def choice(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """The choice of answer n, with its calls; the finish reason is tool_calls if there are any."""
        choice = super().choice(n, outputs, finish_reason)
        text, calls = parse_tool_calls(choice["message"]["content"], self.names)
        if calls:
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
