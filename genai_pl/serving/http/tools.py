"""Tool calls: tools for the chat template, and the calls parsed out of the generated text.

How a model writes a call is found from its chat template (`genai_pl/data/tool_calls.py`); one that shows none is taken
to write <tool_call>{"name": ..., "arguments": {...}}</tool_call>, the format of Hermes and Qwen models.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.tool_calls import Call, CallReader
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.messages import Tool
from genai_pl.serving.http.reasoning import ChannelSplitter, MakeSplitter, split
from genai_pl.serving.http.responses import ChatFormat, Decode, Json
from genai_pl.serving.http.schemas import ChatBody
from genai_pl.serving.service import Service

if TYPE_CHECKING:
    from genai_pl.serving.engine.request import TokenOutput


class ToolChoice(NamedTuple):
    """What tool_choice of a body says.

    is_forced: whether the answer must be a call
    names: of the tools that may be called, None for all of them
    """

    is_forced: bool
    names: frozenset[str] | None


def read_tool_choice(choice: object) -> ToolChoice:
    """The meaning of tool_choice, in OpenAI's forms; ApiError 422 for anything else.

    >>> read_tool_choice({"type": "function", "function": {"name": "add"}})
    ToolChoice(is_forced=True, names=frozenset({'add'}))
    """
    plain = {
        "none": ToolChoice(False, frozenset()),
        "auto": ToolChoice(False, None),
        "required": ToolChoice(True, None),
    }
    if choice is None or (isinstance(choice, str) and choice in plain):
        return plain[choice or "auto"]
    if (name := _function_name(choice)) is not None:
        return ToolChoice(True, frozenset({name}))
    # {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}
    allowed = (
        choice.get("allowed_tools") if isinstance(choice, dict) and choice.get("type") == "allowed_tools" else None
    )
    if isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
        tools = allowed.get("tools")
        names = [_function_name(tool) for tool in tools] if isinstance(tools, list) else []
        if names and None not in names:
            return ToolChoice(allowed["mode"] == "required", frozenset(names))
    known = 'none, auto, required, {"type": "function", "function": {"name": NAME}} or {"type": "allowed_tools", ...}'
    raise ApiError(422, f"tool_choice: give {known}", param="tool_choice")


def _function_name(choice: object) -> str | None:
    """The name in OpenAI's choice of a function; None for anything else."""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def callable_tools(body: ChatBody) -> list[Tool]:
    """The tools of a body that its tool_choice lets the model call; ApiError 422 if it names one that there is not."""
    choice, tools = read_tool_choice(body.tool_choice), body.tools or []
    if not tools and (choice.is_forced or choice.names):
        raise ApiError(422, "tool_choice: there are no tools to choose from", param="tool_choice")
    if choice.names is None:
        return tools
    if unknown := choice.names - {tool.function.name for tool in tools}:
        raise ApiError(422, f"tool_choice: no tool has the name {min(unknown)}", param="tool_choice")
    return [tool for tool in tools if tool.function.name in choice.names]


def offered_tools(service: Service, body: ChatBody) -> list[Json]:
    """Tools for the chat template: those that may be called, and all where one of them must be.

    ApiError 422 if the template cannot show tools.
    """
    found = callable_tools(body)
    if is_forced(body):  # the grammar chooses among them
        found = body.tools
    if not found:
        return []
    if "tools" not in str(service.tokenizer.chat_template):
        raise ApiError(422, "tools: the chat template of this model has no place for any", param="tools")
    return [tool.model_dump(exclude_unset=True) for tool in found]


def is_forced(body: ChatBody) -> bool:
    """True if the answer must be a call."""
    return read_tool_choice(body.tool_choice).is_forced


def forced_call_schema(body: ChatBody) -> Json | None:
    """JSON schema {name, arguments} of the call that the answer must be, of one tool or any; None if it need not be one.

    Definitions ($defs) of the arguments move to the top, where their references look for them.
    """
    if not is_forced(body):
        return None
    functions = [tool.function.model_dump() for tool in callable_tools(body)]
    calls, definitions = [], {}
    for function in functions:
        parameters = function.get("parameters") or {"type": "object"}
        if not isinstance(parameters, dict) or not isinstance(parameters.get("$defs", {}), dict):
            raise ApiError(422, f"tools: the parameters of {function['name']} are no JSON schema", param="tools")
        arguments = dict(parameters)
        definitions |= arguments.pop("$defs", {})
        properties = {"name": {"const": function["name"]}, "arguments": arguments}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def openai_calls(calls: Sequence[Call], tools: Sequence[Json], new_id: Callable[[], str]) -> list[Json]:
    """Calls in OpenAI's shape; none if one cannot be read or names no offered tool: then all of the answer is text.

    >>> tools = [{"type": "function", "function": {"name": "add"}}]
    >>> openai_calls([Call("add", {"a": 1})], tools, lambda: "call_1")[0]["function"]
    {'name': 'add', 'arguments': '{"a": 1}'}
    """
    names = {tool["function"]["name"] for tool in tools}
    if any(call.error or call.name not in names for call in calls):
        return []
    try:
        texts = [json.dumps(call.arguments, ensure_ascii=False, allow_nan=False) for call in calls]
        "".join(texts).encode()
    except ValueError:  # NaN, or half of a surrogate pair: no JSON
        return []
    functions = [{"name": call.name, "arguments": text} for call, text in zip(calls, texts, strict=True)]
    return [{"id": new_id(), "type": "function", "function": function} for function in functions]


class ToolChatFormat(ChatFormat):
    """Choices of a chat with tools; a stream has each answer in one delta, as a call is known only at its end.

    decode, logprobs: as for completions
    tools: offered tools, whose names calls may have
    reader: finds calls in answers of this model
    """

    streams_whole_answers = True

    def __init__(
        self,
        decode: Decode,
        logprobs: int | None,
        tools: Sequence[Json],
        reader: CallReader,
        make_splitter: MakeSplitter = lambda: None,
    ) -> None:
        super().__init__(decode, logprobs, make_splitter)
        self.tools, self.reader = tools, reader

    def choice(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """The choice of answer n, with its calls; the finish reason is tool_calls if there are any."""
        choice = super().choice(n, outputs, finish_reason)
        splitter = self.make_splitter()
        _, content, first = split(outputs, splitter)
        has_channels = isinstance(splitter, ChannelSplitter)  # their splitter leaves calls out already
        ids = [output.token for output in outputs[0 if has_channels else first :]]
        text, found = self.reader.read(content, ids, self.tools)
        text = content if has_channels else text
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


class ForcedCallFormat(ToolChatFormat):
    """Choices of a chat whose answer must be a call: the grammar makes it a JSON object with its name and arguments.

    An answer that is cut off by max_tokens stays text. There are no thoughts, as the grammar leaves no room for them.
    """

    def choice(self, n: int, outputs: "Sequence[TokenOutput]", finish_reason: str | None) -> Json:
        """The choice of answer n, with its call."""
        choice = ChatFormat.choice(self, n, outputs, finish_reason)
        try:
            call = json.loads("".join(output.text for output in outputs))
            found = [Call(call["name"], call["arguments"])]
        except (ValueError, TypeError, KeyError, RecursionError):
            found = []
        if calls := openai_calls(found, self.tools, self.reader.call_id):
            choice["message"] |= {"content": None, "tool_calls": calls}
            choice["finish_reason"] = "tool_calls"
        return choice
