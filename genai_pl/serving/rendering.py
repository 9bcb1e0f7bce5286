"""Answers as bytes of JSON, made beside the event loop and in pieces: no step of it takes long, however large they are."""

import asyncio
import json
from collections.abc import Callable, Iterator

from fastapi.responses import Response

DEPTH = 6  # of an answer's parts that are written one by one: choices, logprobs, tokens


async def json_answer(make: Callable[[], object]) -> Response:
    """The answer that `make` gives, in JSON."""
    content = await asyncio.to_thread(lambda: "".join(written(make())).encode())
    return Response(content, media_type="application/json")


def written(value: object, *, depth: int = DEPTH, in_ascii: bool = False) -> list[str]:
    """The value in JSON, in parts that belong one after the other: json.dumps lets nobody else work meanwhile."""
    deeper = {"depth": depth - 1, "in_ascii": in_ascii}
    if isinstance(value, Iterator):  # one after the other, so that few are there at a time
        parts = [("", written(item, **deeper)) for item in value]
    elif depth > 0 and isinstance(value, dict) and value:
        parts = [(f"{_dumps(str(name), in_ascii)}:", written(item, **deeper)) for name, item in value.items()]
    elif depth > 0 and isinstance(value, list) and value and isinstance(value[0], dict | list):
        parts = [("", written(item, **deeper)) for item in value]
    else:
        return [_dumps(value, in_ascii)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    found = [opening]
    for n, (name, texts) in enumerate(parts):
        found += [f",{name}" if n else name, *texts]
    return [*found, closing]


def _dumps(value: object, in_ascii: bool) -> str:
    return json.dumps(value, ensure_ascii=in_ascii, allow_nan=False, separators=(",", ":"))
