"""Upstream answers: validation of another server's replies, which may be anything, into JSON that can be sent on.

Whatever is wrong with a reply is one error, 502, with the reason in the log only.
"""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx

from genai_pl.serving.errors import ApiError

Json = dict[str, object]
MAX_REPLY_BYTES = 64 * 2**20  # of a reply, or of one line of a stream
MAX_MESSAGE = 2000  # characters of an upstream error message that a client sees
MAX_RETRY_AFTER = 86400  # seconds of a Retry-After header that is forwarded


def bad_gateway(reason: object) -> ApiError:
    """ApiError 502 that tells the client nothing of the upstream server; the reason goes to the log."""
    return ApiError(502, "the server behind this one gave an answer that makes no sense", reason=reason)


@contextmanager
def upstream_errors() -> Iterator[None]:
    """Context for code that reads a reply: what it raises because of the reply's shape becomes ApiError 502."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise bad_gateway(f"{type(error).__name__}: {error}") from None


def parse(content: bytes | str) -> Json:
    """The JSON object of a reply; ApiError 502 for anything else."""
    with upstream_errors():
        return sendable(content)


def sendable(content: bytes | str) -> Json:
    """The JSON object; TypeError, ValueError or RecursionError for anything else, or for values that cannot be sent on."""
    value = json.loads(content, parse_constant=_refuse)
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} where an object belongs")
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # 1e999 and half characters cannot be sent
    return value


def token_count(usage: object, name: str) -> int:
    """A field of `usage`: 0 if it is missing, TypeError if it is no number of tokens."""
    n = usage.get(name) if isinstance(usage, dict) else None
    if n is None:
        return 0
    if type(n) is not int or not 0 <= n < 2**53:
        raise TypeError(f"{name} is no number of tokens")
    return n


def list_of_objects(value: Json, name: str) -> list[Json]:
    """The list of objects under a name (choices, data); KeyError or TypeError for anything else."""
    objects = value[name]
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise TypeError(f"{name} is no list of objects")
    return objects


def list_of_models(value: Json) -> list[Json]:
    """Entries of a reply to GET /models, each with an id; ApiError 502 for anything else."""
    with upstream_errors():
        entries = list_of_objects(value, "data")
        for entry in entries:
            text_of(entry["id"])
        return entries


def text_of(value: object) -> str:
    """The value, if it is text; TypeError otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text belongs")
    return value


async def read_body(reply: httpx.Response) -> bytes:
    """The body of a reply; ApiError 502 if it is larger than MAX_REPLY_BYTES."""
    body = bytearray()
    async for part in reply.aiter_bytes():
        body += part
        if len(body) > MAX_REPLY_BYTES:
            raise bad_gateway(f"more than {MAX_REPLY_BYTES} bytes")
    return bytes(body)


async def read_lines(reply: httpx.Response) -> AsyncIterator[str]:
    """Lines of a reply's body as they arrive; ApiError 502 for a line without end.

    httpx's aiter_lines has no limit of length.
    """
    rest = bytearray()
    async for part in reply.aiter_bytes():
        rest += part
        *complete, last = rest.split(b"\n") if b"\n" in part else [rest]
        rest = bytearray(last)
        for line in complete:
            yield line.decode("utf-8", "replace").strip()
        if len(rest) > MAX_REPLY_BYTES:
            raise bad_gateway(f"a line of more than {MAX_REPLY_BYTES} bytes")
    if rest:
        yield rest.decode("utf-8", "replace").strip()


def client_error(reply: httpx.Response, content: bytes) -> ApiError:
    """The ApiError for an upstream error: its 4xx in this server's shape, everything else 502.

    401 and 403 are 502, too: they are about this server's API key, not the client's.
    """
    message, param = f"status {reply.status_code}", None
    # the message, from OpenAI's {"error": {"message", "param"}} or from any object
    try:
        value = json.loads(content)
        detail = value.get("error", value)
        text = detail.get("message", detail) if isinstance(detail, dict) else detail
        param = detail.get("param") if isinstance(detail, dict) else None
        message = str(text)[:MAX_MESSAGE]
    except (ValueError, AttributeError, RecursionError):
        pass
    if reply.status_code in (401, 403) or not 400 <= reply.status_code < 500:
        answer = f"the server behind this one failed (status {reply.status_code})"
        return ApiError(502, answer, reason=message)
    # Retry-After, if it is a plain number of seconds
    again = reply.headers.get("retry-after", "")
    headers = (
        {"Retry-After": again} if again.isascii() and again.isdigit() and int(again[:9]) <= MAX_RETRY_AFTER else {}
    )
    return ApiError(reply.status_code, message, param=param if isinstance(param, str) else None, headers=headers)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
