"""Conversations in requests: turns of text, tools that may be called, and calls of them."""

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from genai_pl.data.messages import join_parts
from genai_pl.serving.errors import ApiError


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class TextPart(BaseModel):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: Text


class Function(BaseModel):
    """What may be called."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[Text, Field(min_length=1)]


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    function: Function


class CalledFunction(BaseModel):
    """What was called, with its arguments as JSON."""

    name: Text
    arguments: Text

    def plain(self) -> dict[str, object]:
        """The function as chat templates read it, which write the JSON themselves."""
        try:
            arguments = json.loads(self.arguments)
            json.dumps(arguments, ensure_ascii=False).encode()  # half of a surrogate pair is no text
        except (ValueError, RecursionError):
            raise ApiError(422, "messages: the arguments of a call are not JSON", param="messages") from None
        return {"name": self.name, "arguments": arguments}


class ToolCall(BaseModel):
    """A call that the assistant made."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One turn of a conversation."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = None

    def plain(self) -> dict[str, object]:
        """The turn as chat templates read it."""
        whole = (
            self.content if isinstance(self.content, str) else join_parts([part.text for part in self.content or ()])
        )
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, object] = {"role": role, "content": whole}
        if self.tool_calls:
            calls = [{"id": call.id, "type": call.type, "function": call.function.plain()} for call in self.tool_calls]
            turn["tool_calls"] = calls
        return turn if self.tool_call_id is None else {**turn, "tool_call_id": self.tool_call_id}

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise ValueError("it has no content")
        return self
