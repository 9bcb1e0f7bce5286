"""Messages of chat requests: turns of text, tools that the model may call, and calls that it made."""

import json
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from genai_pl.data.assistant_spans import REASONING_KEYS
from genai_pl.data.messages import join_parts
from genai_pl.serving.errors import ApiError

T = TypeVar("T")


def _encodable(text: str) -> str:
    """The text; ValueError for half a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


def _all_encodable(value: T) -> T:
    """A JSON value, or a model of some; ValueError for half a surrogate pair in one of its texts, or for a value too deep."""
    try:
        plain = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        _encodable(json.dumps(plain, ensure_ascii=False))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
JsonObject = Annotated[dict[str, object], AfterValidator(_all_encodable)]  # that a chat template may show


class TextPart(BaseModel):
    """One part of a message's content; images and audio are refused."""

    type: Literal["text"]
    text: Text


class Function(BaseModel):
    """A function's name and whatever else the chat template shows of it (description, parameters), in the given order."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[Text, Field(min_length=1)]

    @model_validator(mode="after")
    def _check_parameters(self) -> "Function":
        if not isinstance(self.model_extra.get("parameters") or {}, dict):
            raise ValueError("parameters is no JSON schema, which is an object")
        return self


class Tool(BaseModel):
    """A tool in OpenAI's shape: {"type": "function", "function": {...}}."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function

    @model_validator(mode="after")
    def _check_texts(self) -> "Tool":
        return _all_encodable(self)


class CalledFunction(BaseModel):
    """Name and arguments of a call; `arguments` is JSON text, as OpenAI has it."""

    name: Text
    arguments: Text

    def plain(self) -> dict[str, object]:
        """The call as chat templates read it, with the arguments parsed: templates write the JSON themselves."""
        try:
            arguments = json.loads(self.arguments) if self.arguments.strip() else {}  # of a function that takes none
            json.dumps(arguments, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except (ValueError, RecursionError):
            raise ApiError(422, "messages: the arguments of a call are not JSON", param="messages") from None
        if not isinstance(arguments, dict):
            raise ApiError(422, "messages: the arguments of a call are no JSON object", param="messages")
        return {"name": self.name, "arguments": arguments}


class ToolCall(BaseModel):
    """A call in an earlier turn of the assistant; `id` links it to the tool's answer."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One turn of a conversation.

    role: system, user, assistant, tool, or whatever the chat template knows; developer is read as system
    content: text or parts of text; None only beside tool_calls or reasoning
    tool_calls: calls of an assistant's turn
    tool_call_id: the call that a tool's turn answers
    name: of the tool that answers, or of who speaks; for templates that print it
    reasoning_content: what the assistant thought before this turn (reasoning, thinking: the same under other names)
    """

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None
    name: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    thinking: Text | None = None

    def plain(self) -> dict[str, object]:
        """The turn as a plain dict for chat templates."""
        whole = (
            self.content if isinstance(self.content, str) else join_parts([part.text for part in self.content or ()])
        )
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, object] = {"role": role, "content": whole}
        if self.tool_calls:
            calls = [{"id": call.id, "type": call.type, "function": call.function.plain()} for call in self.tool_calls]
            turn["tool_calls"] = calls
        given = {key: getattr(self, key) for key in ("tool_call_id", "name", *REASONING_KEYS)}
        return turn | {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and not (self.tool_calls or any(getattr(self, key) for key in REASONING_KEYS)):
            raise ValueError("it has no content")
        return self
