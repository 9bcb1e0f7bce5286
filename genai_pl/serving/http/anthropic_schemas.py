"""Bodies of Anthropic's Messages API, and their conversations as those of chat completions."""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genai_pl.serving.http.messages import CalledFunction, Function, JsonObject, Message, Text, TextPart, Tool, ToolCall
from genai_pl.serving.http.schemas import Body, ChatBody, Count, Stop

TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class ToolUse(BaseModel):
    """A call in an assistant's turn."""

    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, object]


class ToolResult(BaseModel):
    """What a tool answered to the call `tool_use_id`."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    is_error: bool = False


class Thinking(BaseModel):
    """What the assistant thought; the signature is not checked, as this server signs nothing."""

    type: Literal["thinking"]
    thinking: Text
    signature: Text = ""


Block = Annotated[TextPart | ToolUse | ToolResult | Thinking, Field(discriminator="type")]


class Turn(BaseModel):
    """One turn: a text, or blocks of text, calls, results and thoughts."""

    role: Literal["user", "assistant"]
    content: Text | Annotated[list[Block], Field(fail_fast=True, min_length=1)]

    def messages(self) -> Iterator[Message]:
        """The turn as messages of chat completions: each result of a tool is a message of its own, before the text."""
        if isinstance(self.content, str):
            yield Message(role=self.role, content=self.content)
            return
        kinds = (ToolUse, Thinking) if self.role == "user" else (ToolResult,)
        if any(isinstance(block, kinds) for block in self.content):
            raise ValueError(f"a turn of the {self.role} has no block of this type")
        texts, calls, thoughts = [], [], []
        for block in self.content:
            if isinstance(block, ToolResult):
                yield Message(role="tool", content=block.content or "", tool_call_id=block.tool_use_id)
            elif isinstance(block, ToolUse):
                function = CalledFunction(name=block.name, arguments=json.dumps(block.input))
                calls.append(ToolCall(id=block.id, function=function))
            elif isinstance(block, Thinking):
                thoughts.append(block.thinking)
            else:
                texts.append(block)
        if texts or calls or thoughts:
            thought = "\n".join(thoughts) or None
            yield Message(role=self.role, content=texts or "", tool_calls=calls or None, reasoning_content=thought)


class ClientTool(BaseModel):
    """A tool that the client runs; tools of Anthropic's own servers have another `type` and are refused."""

    model_config = ConfigDict(extra="allow")
    type: Literal["custom"] | None = None
    name: Annotated[Text, Field(min_length=1)]
    description: Text | None = None
    input_schema: JsonObject

    def function(self) -> Tool:
        """The tool as chat completions have it."""
        shown = {} if self.description is None else {"description": self.description}
        return Tool(type="function", function=Function(name=self.name, **shown, parameters=self.input_schema))


class ToolChoice(BaseModel):
    """Whether tools may, must or must not be called; `tool` names one that must be."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool = False


class ThinkingOption(BaseModel):
    """Whether thoughts are part of the answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None


class OutputFormat(BaseModel):
    """A JSON schema that the answer follows."""

    type: Literal["json_schema"]
    schema_: JsonObject = Field(alias="schema")


class OutputConfig(BaseModel):
    """The form of the answer, and how much the model thinks; high is the default."""

    model_config = ConfigDict(extra="forbid")
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(Body):
    """Body of POST /v1/messages/count_tokens: a conversation."""

    model: Text
    messages: Annotated[list[Turn], Field(fail_fast=True, min_length=1)]
    system: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tools: Annotated[list[ClientTool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOption | None = None
    output_config: OutputConfig | None = None

    @property
    def shows_thoughts(self) -> bool:
        """True if the answer has blocks of thoughts."""
        return self.thinking is not None and self.thinking.type != "disabled"

    def chat(self, **options: object) -> ChatBody:
        """The same conversation as a body of chat completions."""
        given = {**self._tools(), **self._output(), **options}
        return ChatBody(model=self.model, messages=[*self._system(), *self._turns()], **given)

    def _turns(self) -> list[Message]:
        return [message for turn in self.messages for message in turn.messages()]

    def _system(self) -> Sequence[Message]:
        return [Message(role="system", content=self.system)] if self.system else []

    def _tools(self) -> dict[str, object]:
        """The fields tools and tool_choice."""
        tools = [tool.function() for tool in self.tools] if self.tools else None
        if self.tool_choice is None:
            return {"tools": tools}
        named = {"type": "function", "function": {"name": self.tool_choice.name}}
        return {"tools": tools, "tool_choice": TOOL_CHOICES.get(self.tool_choice.type, named)}

    def _output(self) -> dict[str, object]:
        """The fields response_format and reasoning_effort."""
        config, found = self.output_config or OutputConfig(), {}
        if config.format is not None:
            found["response_format"] = {"type": "json_schema", "json_schema": {"schema": config.format.schema_}}
        if config.effort not in (None, "high"):
            found["reasoning_effort"] = config.effort
        return found

    @model_validator(mode="after")
    def _check(self) -> "CountBody":
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last turn is the user's; a begun answer cannot be continued")
        if self.tool_choice is not None and (self.tool_choice.type == "tool") != (self.tool_choice.name is not None):
            raise ValueError("tool_choice: a name goes with the type tool")
        self._turns()
        return self


class MessagesBody(CountBody):
    """Body of POST /v1/messages."""

    max_tokens: Count
    stop_sequences: Stop = []
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31)] | None = None
    stream: bool = False

    def chat(self, **options: object) -> ChatBody:
        """The request as one of chat completions."""
        names = ("temperature", "top_p", "top_k", "max_tokens")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return super().chat(stop=list(self.stop_sequences) or None, **given, **options)
