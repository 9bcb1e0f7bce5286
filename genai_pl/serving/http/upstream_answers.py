"""Answers of another server, which may be anything: read into plain JSON that our own answers may hold, or refused."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx

from genai_pl.serving.errors import ApiError

Json = dict[str, object]
LARGEST = 64 * 2**20  # bytes of an answer, or of a line of a stream
SHOWN = 2000  # characters of its message that a client sees
AGAIN = 86400  # the longest Retry-After that is handed on, in seconds


def bad_gateway(reason: object) -> ApiError:
    """502, in words that say nothing of what lies behind."""
    return ApiError(502, "the server behind this one gave an answer that makes no sense", reason=reason)


@contextmanager
def upstream_errors() -> Iterator[None]:
    """What goes wrong inside because of the other server's answer is its fault, not ours."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise bad_gateway(f"{type(error).__name__}: {error}") from None


def parse(content: bytes | str) -> Json:
    """The JSON object, of which ours can be made; ApiError 502 for anything else."""
    with upstream_errors():
        return sendable(content)


def sendable(content: bytes | str) -> Json:
    """The JSON object; TypeError, ValueError or RecursionError for anything else, or for what cannot be sent on."""
    value = json.loads(content, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} where an object belongs")
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 and half characters cannot be sent
    return value


def token_count(usage: object, name: str) -> int:
    """A number of tokens in what an answer says it cost; 0 where it says nothing, TypeError where it is no number."""
    n = usage.get(name) if isinstance(usage, dict) else None
    if n is None:
        return 0
    if type(n) is not int or not 0 <= n < 2**53:
        raise TypeError(f"{name} is no number of tokens")
    return n


def list_of_objects(value: Json, name: str) -> list[Json]:
    """The answers, vectors or models in it; TypeError or KeyError where they are not what a client expects."""
    objects = value[name]
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise TypeError(f"{name} is no list of objects")
    return objects


def list_of_models(value: Json) -> list[Json]:
    """The models that it serves, each with an id."""
    with upstream_errors():
        entries = list_of_objects(value, "data")
        for entry in entries:
            text_of(entry["id"])
        return entries


def text_of(value: object) -> str:
    """The text; TypeError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    return value


async def read_body(reply: httpx.Response) -> bytes:
    """Its body; ApiError 502 for one without end."""
    body = bytearray()
    async for part in reply.aiter_bytes():
        body += part
        if len(body) > LARGEST:
            raise bad_gateway(f"more than {LARGEST} bytes")
    return bytes(body)


async def read_lines(reply: httpx.Response) -> AsyncIterator[str]:
    """Its body line by line as it comes."""
    rest = bytearray()
    async for part in reply.aiter_bytes():
        rest += part
        *complete, last = rest.split(b"\n") if b"\n" in part else [rest]
        rest = bytearray(last)
        for line in complete:
            yield line.decode("utf-8", "replace").strip()
        if len(rest) > LARGEST:
            raise bad_gateway(f"a line of more than {LARGEST} bytes")
    if rest:
        yield rest.decode("utf-8", "replace").strip()


def client_error(reply: httpx.Response, content: bytes) -> ApiError:
    """The other server's error in our shape; its own failures are 502 here, and its keys are not the client's business."""
    message, param = f"status {reply.status_code}", None
    try:
        value = json.loads(content)
        detail = value.get("error", value)
        text = detail.get("message", detail) if isinstance(detail, dict) else detail
        param = detail.get("param") if isinstance(detail, dict) else None
        message = str(text)[:SHOWN]
    except (ValueError, AttributeError, RecursionError):
        pass
    if reply.status_code in (401, 403) or not 400 <= reply.status_code < 500:
        answer = f"the server behind this one failed (status {reply.status_code})"
        return ApiError(502, answer, reason=message)
    again = reply.headers.get("retry-after", "")
    headers = {"Retry-After": again} if again.isascii() and again.isdigit() and int(again[:9]) <= AGAIN else {}
    return ApiError(reply.status_code, message, param=param if isinstance(param, str) else None, headers=headers)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
