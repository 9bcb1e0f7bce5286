"""Functions that a model may call: what its chat template is told of them, and the calls in what it writes."""

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

OPENING, CLOSING = "<tool_call>", "</tool_call>"  # as Hermes and Qwen write them


def offered_tools(service: Service, body: ChatBody) -> list[Json]:
    """The tools that the chat template is told of; ApiError 422 where it has no place for any."""
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
    """The text outside of calls, and the calls; all of it is text where one of them cannot be read."""
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
    """Where calls begin and end in the text, markers included; every character is looked at once or twice."""
    end = 0
    while (begin := text.find(OPENING, end)) >= 0:
        closing = text.find(CLOSING, begin + len(OPENING))
        if closing < 0:
            return
        end = closing + len(CLOSING)
        yield begin, end


class ToolChatFormat(ChatFormat):
    """A chat in which the assistant may call tools; a stream has each answer in one delta, once it is whole."""

    streams_whole_answers = True

    def __init__(self, decode: Decode, logprobs: int | None, tools: Sequence[Json]) -> None:
        super().__init__(decode, logprobs)
        self.names = {tool["function"]["name"] for tool in tools}

    def choice(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """Answer n, whole."""
        choice = super().choice(n, outputs, finish_reason)
        text, calls = parse_tool_calls(choice["message"]["content"], self.names)
        if calls:
            choice["message"] |= {"content": text or None, "tool_calls": calls}
            choice["finish_reason"] = "tool_calls"
        return choice

    def whole_chunk(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """Answer n as the one delta of a stream."""
        choice = self.choice(n, outputs, finish_reason)
        delta = {k: v for k, v in choice.pop("message").items() if k != "refusal"}
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
        return {**choice, "delta": delta}
