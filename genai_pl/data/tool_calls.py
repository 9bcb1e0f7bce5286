"""Tool calls in a generated text: what a model asks to be run, parsed in the format that its chat template writes.

Templates write a call in a few ways: JSON between markers (Hermes, Qwen, Nemotron, Mistral), XML inside of them (Qwen
Coder, GLM), a name and JSON (Mistral from 2025 on), JSON alone (Llama 3), or a message to a recipient (gpt-oss). The
format of a template is found by rendering a call and parsing it back, so no model is known by name.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from genai_pl.data.assistant_spans import PROBE_QUESTION, PROBES, Tools
from genai_pl.data.chat_template import ChatTemplate
from genai_pl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Call(NamedTuple):
    """A call as it was written.

    name: of the tool, empty where none can be read. arguments: by name. error: why it cannot be run, or empty.
    """

    name: str
    arguments: dict[str, object]
    error: str = ""


class Found(NamedTuple):
    """A call and its characters in the text, markers included."""

    start: int
    end: int
    call: Call


Find = Callable[[str, Mapping[str, Mapping[str, object]]], Iterator[Found]]


class CallFormat(NamedTuple):
    """How a model writes its calls.

    find: the calls in a text, in order; types: the JSON schemas of arguments by tool, which say what is a number in XML.
    has_special_tokens: calls are only seen in a text that is decoded with its special tokens.
    id_length: characters of the ids that the template accepts.
    """

    find: Find
    has_special_tokens: bool = False
    id_length: int = 24

    def parse(self, text: str, tools: Tools) -> tuple[str, list[Call]]:
        """(text outside of calls, calls) of an answer."""
        outside, calls, end = [], [], 0
        for found in self.find(text, argument_types(tools)):
            outside.append(text[end : found.start])
            calls.append(found.call)
            end = found.end
        return ("".join([*outside, text[end:]]).strip() if calls else text), calls


def argument_types(tools: Tools) -> dict[str, Mapping[str, object]]:
    """The JSON schemas of the arguments of each tool, by its name; what is no object, where a schema has one, is left out."""
    functions = [tool.get("function", tool) for tool in tools]
    properties = {f.get("name"): _object(_object(f.get("parameters")).get("properties")) for f in functions}
    return {name: {key: _object(schema) for key, schema in found.items()} for name, found in properties.items()}


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def call_format(template: ChatTemplate) -> CallFormat | None:
    """The format in which a template writes calls, or None where it writes none that is known."""
    name, arguments = "look_up", {"words": PROBES[0]}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}
    schema = {"type": "object", "properties": {"words": {"type": "string", "description": "words"}}}
    tools = [{"type": "function", "function": {"name": name, "description": "Finds.", "parameters": schema}}]
    turns = [PROBE_QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
    try:
        rendering = template.render_with_spans(turns, tools=tools)
    except DataError:  # a template without tools or calls
        return None
    text = rendering.text[slice(*rendering.spans[-1])]
    ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
    plain = template.tokenizer.decode(ids, skip_special_tokens=True)
    for form in FORMATS:
        if form.parse(without_end(template, text), tools)[1] == [Call(name, arguments)]:
            return form._replace(has_special_tokens=form.parse(plain, tools)[1] != [Call(name, arguments)])
    return None


class CallReader:
    """Reads the calls in a model's answers.

    template: the chat template, which shows how calls are written. form: the format; that of Hermes and Qwen, JSON in
    <tool_call>, where the template writes none, as models learn it from answers too.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.template = ChatTemplate(tokenizer)
        self.form = call_format(self.template) or JSON_FORMAT

    def read(self, text: str, ids: Sequence[int], tools: Tools) -> tuple[str, list[Call]]:
        """(text outside of calls, calls) of an answer: its text without special tokens, and its tokens."""
        if not self.form.has_special_tokens:
            return self.form.parse(text, tools)
        whole = without_end(self.template, self.template.tokenizer.decode(ids, skip_special_tokens=False))
        outside, calls = self.form.parse(whole, tools)
        return (self.template.special.sub("", outside).strip(), calls) if calls else (text, [])

    def call_id(self) -> str:
        """A new id for a call; one of few characters is a kind that the template checks."""
        number = uuid.uuid4().hex[: self.form.id_length]
        return number if self.form.id_length < JSON_FORMAT.id_length else f"call_{number}"


def without_end(template: ChatTemplate, text: str) -> str:
    """The text without the special tokens and spaces that end it."""
    while True:
        shorter = text.rstrip()
        last = next(
            (m for m in template.special.finditer(shorter, max(0, len(shorter) - 64)) if m.end() == len(shorter)), None
        )
        if last is None:
            return shorter
        text = shorter[: last.start()]


def _marked_json(opening: str, closing: str) -> Find:
    """Finds JSON between two markers: a call, a list of calls, or calls one after the other."""

    def find(text: str, types: Mapping[str, Mapping[str, object]]) -> Iterator[Found]:
        for start, inner, end in marked(text, opening, closing):
            for call in _calls_of_json(inner):
                yield Found(start, end, call)
                start = end

    return find


def marked(text: str, opening: str, closing: str) -> Iterator[tuple[int, str, int]]:
    """(start, text between, end) of each pair of markers; linear in the text, whatever markers it has."""
    end = 0
    while (start := text.find(opening, end)) >= 0:
        inner = start + len(opening)
        close = text.find(closing, inner)
        if close < 0:
            return
        end = close + len(closing)
        yield start, text[inner:close], end


def _calls_of_json(source: str) -> list[Call]:
    """The calls of a JSON value, or of several after each other; one with an error where it is none."""
    values, rest = [], source.strip()
    decoder = json.JSONDecoder()
    try:
        while rest:
            value, end = decoder.raw_decode(rest)
            values += value if isinstance(value, list) else [value]
            rest = rest[end:].lstrip(" \n\t,;")
    except (ValueError, RecursionError) as error:
        return [Call("", {}, f"the call is not JSON: {error}")]
    return [_call_of(value) for value in values] or [Call("", {}, "the call is empty")]


def _call_of(value: object) -> Call:
    """The call of an object {name, arguments or parameters}."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return Call("", {}, "a call is an object with a name and arguments")
    arguments = value.get("arguments", value.get("parameters", {}))
    return _call(value["name"], arguments)


def _call(name: str, arguments: object) -> Call:
    """A call of a tool with these arguments, which may be JSON text."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return Call(name, {}, f"the arguments are not JSON: {error}")
    if not isinstance(arguments, dict):
        return Call(name, {}, "the arguments are not an object")
    return Call(name, arguments)


def _marked_xml(text: str, types: Mapping[str, Mapping[str, object]]) -> Iterator[Found]:
    """Calls <tool_call><function=name><parameter=key>value</parameter></function></tool_call> (Qwen Coder)."""
    for start, inner, end in marked(text, "<tool_call>", "</tool_call>"):
        head = re.match(r"\s*<function=([^>\s]+)>", inner)
        if head is None:
            yield Found(start, end, Call("", {}, "a call begins with <function=NAME>"))
            continue
        pairs = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", inner[head.end() :], re.DOTALL)
        yield Found(start, end, Call(head[1], _typed(pairs, types.get(head[1], {}))))


def _marked_keys(text: str, types: Mapping[str, Mapping[str, object]]) -> Iterator[Found]:
    """Calls <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call> (GLM)."""
    for start, inner, end in marked(text, "<tool_call>", "</tool_call>"):
        name = inner.partition("<arg_key>")[0].strip()
        pairs = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", inner, re.DOTALL)
        yield Found(start, end, Call(name, _typed(pairs, types.get(name, {}))))


def _typed(pairs: Sequence[tuple[str, str]], schemas: Mapping[str, object]) -> dict[str, object]:
    """Arguments written as text, with those that are no texts parsed as JSON; one that is no JSON stays text."""
    arguments: dict[str, object] = {}
    for key, value in pairs:
        arguments[key] = value
        if (schemas.get(key) or {}).get("type") != "string":
            try:
                arguments[key] = json.loads(value)
            except (ValueError, RecursionError):
                continue
    return arguments


NAMED = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?")


def _named_json(text: str, types: Mapping[str, Mapping[str, object]]) -> Iterator[Found]:
    """Calls [TOOL_CALLS]name[ARGS]{...} (Mistral from 2025 on); one after the other, each with its marker."""
    for match in NAMED.finditer(text):
        end = text.find("[TOOL_CALLS]", match.end())
        end = len(text) if end < 0 else end
        yield Found(match.start(), end, _call(match[1], text[match.end() : end].strip()))


def _listed_json(text: str, types: Mapping[str, Mapping[str, object]]) -> Iterator[Found]:
    """Calls [TOOL_CALLS][{...}, ...] to the end of the text (Mistral until 2024)."""
    start = text.find("[TOOL_CALLS]")
    if start >= 0:
        for call in _calls_of_json(text[start + len("[TOOL_CALLS]") :]):
            yield Found(start, len(text), call)
            start = len(text)


RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)((?:(?!<\|message\|>).){0,200})<\|message\|>", re.DOTALL)


def _harmony(text: str, types: Mapping[str, Mapping[str, object]]) -> Iterator[Found]:
    """Messages to functions, `<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}` (gpt-oss)."""
    start = 0
    for match in RECIPIENT.finditer(text):
        stops = [n for n in (text.find(stop, match.end()) for stop in ("<|call|>", "<|start|>", "<|end|>")) if n >= 0]
        end = min(stops, default=len(text))
        # the header of the message is no text
        header = max(text.rfind("<|start|>", start, match.start()), text.rfind("<|channel|>", start, match.start()), -1)
        yield Found(header if header >= 0 else match.start(), end, _call(match[1], text[match.end() : end].strip()))
        start = end


def _bare_json(text: str, types: Mapping[str, Mapping[str, object]]) -> Iterator[Found]:
    """An answer that is nothing but calls {"name": ..., "parameters": {...}} (Llama 3); other JSON is an answer."""
    source = text.strip().removeprefix("<|python_tag|>").strip()
    if not re.match(r'\{\s*"(name|type)"', source):
        return
    calls = _calls_of_json(source)
    if all(call.name or call.error for call in calls):
        for n, call in enumerate(calls):
            yield Found(0 if n == 0 else len(text), len(text), call)


JSON_FORMAT = CallFormat(_marked_json("<tool_call>", "</tool_call>"))
FORMATS = [
    JSON_FORMAT,
    CallFormat(_marked_xml),
    CallFormat(_marked_keys),
    CallFormat(_marked_json("<TOOLCALL>", "</TOOLCALL>")),
    CallFormat(_marked_json("<tool_calls>", "</tool_calls>")),
    CallFormat(_listed_json, id_length=9),
    CallFormat(_named_json, id_length=9),
    CallFormat(_harmony),
    CallFormat(_bare_json),
]
