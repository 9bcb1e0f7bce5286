"""Structured outputs: response_format (OpenAI) and guided_* or structured_outputs (vLLM) as settings of constrained decoding.

All forms become one of two fields of GenerationConfig, `json_schema` or `regex`; a choice of texts is the regular expression
with their alternatives. Sizes are bounded, since compiling a grammar can take the third power of its length.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from genai_pl.config.generation import GenerationConfig
from genai_pl.errors import ConfigError
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.schemas import ChatBody, OpenAISampling
from genai_pl.serving.http.tools import forced_call_schema
from genai_pl.serving.service import Service

MAX_FORM = 65_536  # characters of a schema, or of the texts of a choice together
MAX_PATTERN = 4096  # characters of a regular expression, or of all in a schema


class FormatConstraint(NamedTuple):
    """One structured output that a body asks for.

    param: field of the body that asks for it, for errors
    kind: json, json_object, regex or choice, vLLM's names
    value: schema, expression or texts, not yet validated
    """

    param: str
    kind: str
    value: object


async def apply_response_format(service: Service, body: OpenAISampling, config: GenerationConfig) -> GenerationConfig:
    """The config with the structured output of the body, if any, compiled; ApiError 422 if it cannot be or there are two."""
    constraints = list(_requested_constraints(body))
    if not constraints:
        return config
    param = constraints[0].param
    if len(constraints) > 1:
        raise ApiError(422, f"{param} and {constraints[1].param}: give one of them", param=param)
    # a text that is complete can only end
    if body.ignore_eos or body.min_tokens:
        other = "ignore_eos" if body.ignore_eos else "min_tokens"
        raise ApiError(422, f"{other} and {param}: give one of them", param=other)
    config = replace(config, **_constraint(constraints[0]))
    try:
        await service.prepare(config)
    except (ConfigError, UnicodeError) as error:  # half a surrogate pair is no text
        reason = re.sub(r"generation\.(json_schema|regex)", param, str(error))
        raise ApiError(422, reason, param=param) from None
    return config


def _requested_constraints(body: OpenAISampling) -> Iterator[FormatConstraint]:
    """All structured outputs of a body, in OpenAI's fields and in vLLM's old and new ones."""
    if isinstance(body, ChatBody) and (schema := forced_call_schema(body)) is not None:
        yield FormatConstraint("tool_choice", "json", schema)
    if body.response_format is not None:
        yield from _response_format(body.response_format)
    for kind in ("json", "regex", "choice"):
        value = getattr(body, f"guided_{kind}")
        if value is not None:
            yield FormatConstraint(f"guided_{kind}", kind, value)
    for kind, value in (body.structured_outputs or {}).items():
        if value is not None and value is not False:
            yield FormatConstraint(f"structured_outputs.{kind}", kind, value)


def _response_format(response_format: dict[str, object]) -> Iterator[FormatConstraint]:
    kind = response_format.get("type")
    if kind == "json_object":
        yield FormatConstraint("response_format", "json_object", True)
    elif kind == "json_schema":
        inner = response_format.get("json_schema")
        yield FormatConstraint(
            "response_format.json_schema", "json", inner.get("schema") if isinstance(inner, dict) else None
        )
    elif kind != "text":
        raise ApiError(422, "response_format: its type is text, json_object or json_schema", param="response_format")


def _constraint(constraint: FormatConstraint) -> dict[str, str | None]:
    """The two fields of GenerationConfig for a structured output; ApiError 422 for a value that is none.

    A schema becomes JSON text, which begins with a brace and so is never read as the name of a file.
    """
    if constraint.kind == "json_object":
        return {"json_schema": '{"type": "object"}', "regex": None}
    if constraint.kind == "json":
        return {"json_schema": _schema(constraint), "regex": None}
    if constraint.kind == "regex" and isinstance(constraint.value, str):
        _check_length(constraint, len(constraint.value), MAX_PATTERN)
        return {"json_schema": None, "regex": constraint.value}
    texts = constraint.value if isinstance(constraint.value, list) else []
    if constraint.kind == "choice" and texts and all(isinstance(text, str) and text for text in texts):
        _check_length(constraint, sum(map(len, texts)), MAX_FORM)
        return {"json_schema": None, "regex": "|".join(re.escape(text) for text in texts)}
    kinds = {"regex": "an expression", "choice": "a list of texts"}
    problem = f"give {kinds[constraint.kind]}" if constraint.kind in kinds else "no such option of this server"
    raise ApiError(422, f"{constraint.param}: {problem}", param=constraint.param)


def _schema(constraint: FormatConstraint) -> str:
    """JSON text of a schema, which clients may send as an object or as text."""
    try:
        schema = json.loads(constraint.value) if isinstance(constraint.value, str) else constraint.value
        if isinstance(schema, dict):
            text = json.dumps(schema)
            _check_length(constraint, len(text), MAX_FORM)
            _check_length(constraint, sum(map(len, _patterns(schema))), MAX_PATTERN, what="of regular expressions")
            return text
    except (ValueError, RecursionError):
        pass
    raise ApiError(422, f"{constraint.param}: give a JSON schema, which is an object", param=constraint.param)


def _patterns(schema: object) -> Iterator[str]:
    """All regular expressions in a schema: values of `pattern`, keys of `patternProperties`."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if isinstance(part.get("pattern"), str):
                yield part["pattern"]
            if isinstance(part.get("patternProperties"), dict):
                yield from part["patternProperties"]
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _check_length(constraint: FormatConstraint, n: int, most: int, *, what: str = "in all") -> None:
    """Raise ApiError 422 for more than `most` characters."""
    if n > most:
        raise ApiError(422, f"{constraint.param}: {n:,} characters {what}, at most {most:,}", param=constraint.param)
