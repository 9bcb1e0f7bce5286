"""Bodies of OpenAI's Responses API, and their items as messages of chat completions."""

import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genai_pl.serving.http.messages import CalledFunction, Function, JsonObject, Message, Text, TextPart, Tool, ToolCall
from genai_pl.serving.http.schemas import Body, ChatBody, Count, Effort, Stop

TEXTS = ("input_text", "output_text", "reasoning_text", "summary_text", "text")


class Part(BaseModel):
    """A part of a message's content; images, audio and files are refused."""

    model_config = ConfigDict(extra="allow")
    type: Literal[TEXTS]
    text: Text


TextParts = Annotated[list[Part], Field(fail_fast=True)]


class Item(BaseModel):
    """One item of the input: a message, a call, what a tool answered, or thoughts.

    type: message if it is left out. role, content: of a message; of thoughts content or summary have the text
    call_id, name, arguments, output: of calls and answers to them
    """

    model_config = ConfigDict(extra="allow")
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Text | TextParts | None = None
    summary: TextParts | None = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: Text | None = None
    output: Text | TextParts | None = None

    @property
    def thoughts(self) -> str:
        """The text of thoughts."""
        return "\n".join(part.text for part in (self.content or self.summary or ()) if isinstance(part, Part))

    def message(self) -> Message:
        """A message or the answer to a call as chat completions have it."""
        if self.type == "function_call_output":
            return Message(role="tool", content=_plain(self.output), tool_call_id=self.call_id)
        return Message(role=self.role, content=_plain(self.content))

    @model_validator(mode="after")
    def _check(self) -> "Item":
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }
        for name in needed.get(self.type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"a {self.type} has the field {name}")
        return self


def _plain(content: str | Sequence[Part]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(type="text", text=part.text) for part in content]


def conversation(items: Sequence[Item]) -> list[Message]:
    """Messages of chat completions; thoughts, text and calls of one assistant's turn become one message.

    >>> turns = conversation([Item(type="function_call", call_id=n, name="f", arguments="{}") for n in "ab"])
    >>> [call.id for turn in turns for call in turn.tool_calls]
    ['a', 'b']
    """
    messages: list[Message] = []
    thoughts: str | None = None
    for item in items:
        if item.type == "reasoning":
            thoughts = item.thoughts or None
        elif item.type == "function_call":
            call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            last = messages[-1] if messages and messages[-1].role == "assistant" and thoughts is None else None
            if last is None:
                last = Message(role="assistant", content="", reasoning_content=thoughts)
                messages.append(last)
            last.tool_calls = [*(last.tool_calls or ()), call]
            thoughts = None
        else:
            message = item.message()
            if message.role == "assistant":
                message.reasoning_content, thoughts = thoughts, None
            messages.append(message)
    return messages


class FunctionTool(BaseModel):
    """A function that the client runs; OpenAI's own tools have another `type` and are refused."""

    model_config = ConfigDict(extra="allow")
    type: Literal["function"]
    name: Annotated[Text, Field(min_length=1)]
    description: Text | None = None
    parameters: JsonObject | None = None

    def function(self) -> Tool:
        """The tool as chat completions have it."""
        shown = {"description": self.description, "parameters": self.parameters}
        given = {name: value for name, value in shown.items() if value is not None}
        return Tool(type="function", function=Function(name=self.name, **given))


class NamedChoice(BaseModel):
    """A function that must be called."""

    type: Literal["function"]
    name: Text

    def as_chat(self) -> dict[str, object]:
        """The choice as chat completions have it."""
        return {"type": "function", "function": {"name": self.name}}


class AllowedTools(BaseModel):
    """Functions of which any may (auto), or one must (required), be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(fail_fast=True, min_length=1)]


class TextOptions(BaseModel):
    """The form of the text: format.type is text, json_object or json_schema; other verbosity than the default is refused."""

    model_config = ConfigDict(extra="forbid")
    format: dict[str, object] | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(BaseModel):
    """How much the model thinks before it answers. Thoughts come whole, as the item reasoning: no summary is made of them."""

    model_config = ConfigDict(extra="forbid")
    effort: Effort | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class ResponseStreamOptions(BaseModel):
    """Options of a stream: events are not padded."""

    model_config = ConfigDict(extra="forbid")
    include_obfuscation: Literal[False] | None = None


class ResponsesBody(Body):
    """Body of POST /v1/responses."""

    input: Text | Annotated[list[Item], Field(fail_fast=True, min_length=1)]
    model: Text | None = None
    instructions: Text | None = None
    previous_response_id: Text | None = None
    store: bool = True
    stream: bool = False
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Stop | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | AllowedTools | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Field(fail_fast=True)] | None = Field(
        None, description="thoughts are not encrypted: items have them as content, whatever is included"
    )
    stream_options: ResponseStreamOptions | None = None
    top_logprobs: Literal[0] | None = None
    max_tool_calls: Count | None = Field(
        None, description="of tools that run on OpenAI's servers, of which there are none"
    )
    truncation: Literal["disabled"] | None = Field(None, description="a conversation is never cut")
    background: Literal[False] | None = None
    metadata: dict[str, object] | None = None
    parallel_tool_calls: bool | None = None

    def messages(self) -> list[Message]:
        """The new messages of the input."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return conversation(self.input)

    def as_chat(self, earlier: Sequence[Message]) -> ChatBody:
        """The request as one of chat completions, after the earlier messages."""
        system = [Message(role="system", content=self.instructions)] if self.instructions else []
        names = {"temperature": "temperature", "top_p": "top_p", "max_output_tokens": "max_completion_tokens"}
        options = {theirs: getattr(self, ours) for ours, theirs in names.items() if getattr(self, ours) is not None}
        if self.reasoning is not None:
            options["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            options["tools"] = [tool.function() for tool in self.tools]
        if isinstance(self.tool_choice, NamedChoice):
            options["tool_choice"] = self.tool_choice.as_chat()
        elif isinstance(self.tool_choice, AllowedTools):
            names = [tool.as_chat() for tool in self.tool_choice.tools]
            allowed = {"mode": self.tool_choice.mode, "tools": names}
            options["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        elif self.tool_choice is not None:
            options["tool_choice"] = self.tool_choice
        if self.text is not None and self.text.format is not None:
            form = self.text.format
            is_schema = form.get("type") == "json_schema"
            options["response_format"] = {"type": "json_schema", "json_schema": form} if is_schema else form
        messages = [*system, *earlier, *self.messages()]
        return ChatBody(model=self.model, messages=messages, stop=self.stop or None, **options)

    @model_validator(mode="after")
    def _check(self) -> "ResponsesBody":
        if not self.messages() and self.previous_response_id is None:
            raise ValueError("input: thoughts alone are no conversation")
        # the answer repeats these: they must be JSON, and text
        try:
            repeated = self.model_dump(include={"tools", "tool_choice", "text", "metadata"})
            json.dumps(repeated, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            raise ValueError(
                "tools, text and metadata: a number or character in them is none that JSON can have"
            ) from None
        return self
