"""Tools of an environment: functions offered to the model as schemas, and its calls of them run with a time limit."""

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence

from genai_pl.data.tool_calls import Call
from genai_pl.data.tool_schemas import Schema, function_schema
from genai_pl.environments.user_code import one_line, within
from genai_pl.errors import ConfigError


class Tools:
    """Functions by name.

    functions: with typed arguments and docstrings. option: names them in errors. timeout: seconds of one call.

    schemas: what the chat template prints. A call never raises: what went wrong is its result, which the model reads.
    """

    def __init__(self, functions: Sequence[Callable[..., object]], *, option: str, timeout: float) -> None:
        self.schemas: list[Schema] = [function_schema(function, option) for function in functions]
        names = [schema["function"]["name"] for schema in self.schemas]
        if len(set(names)) < len(names):
            raise ConfigError(f"{option}: two tools are called {next(n for n in names if names.count(n) > 1)}")
        self.functions = dict(zip(names, functions, strict=True))
        self.timeout = timeout

    async def run(self, call: Call) -> tuple[str, bool]:
        """(result of a call as text, whether it worked)."""
        if call.error:
            return f"error: {call.error}", False
        function = self.functions.get(call.name)
        if function is None:
            return f"error: there is no tool {call.name}, but {', '.join(self.functions)}", False
        try:
            inspect.signature(function).bind(**call.arguments)
        except TypeError as error:
            return f"error: {call.name}: {error}", False
        # a coroutine waits beside those of other episodes; anything else runs in a thread of its own
        is_async = inspect.iscoroutinefunction(function)
        try:
            return as_text(await within(self.timeout, lambda: function(**call.arguments), is_async=is_async)), True
        except (TimeoutError, asyncio.TimeoutError):
            return f"error: {call.name} gave no answer within {self.timeout:g} seconds", False
        except (Exception, asyncio.CancelledError) as error:  # of the tool, for the model to read
            return f"error: {call.name}: {one_line(error) or type(error).__name__}", False


def as_text(result: object) -> str:
    """The result of a tool as text: itself, or JSON; TypeError or ValueError for what is neither.

    >>> as_text("a"), as_text({"b": [1, None]})
    ('a', '{"b": [1, null]}')
    """
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


def _plain(value: object) -> object:
    """What JSON has for a number or array of numpy or torch, or for an object with a text of its own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, bytes) or type(value).__str__ is object.__str__:  # the latter shows an address of memory
        raise TypeError(f"a tool returned {type(value).__name__}, which is no text, number, list or dict")
    return str(value)
