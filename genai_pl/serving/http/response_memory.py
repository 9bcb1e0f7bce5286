"""Memory of responses: conversations that `previous_response_id` continues, within a bound of bytes."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from genai_pl.serving.errors import ApiError
from genai_pl.serving.fair_queue import CLIENT
from genai_pl.serving.http.messages import Message
from genai_pl.serving.http.responses import Json

OVERHEAD = 4096  # bytes of an entry beside its characters: Python's objects


class Stored(NamedTuple):
    """A response, the conversation that its answer ends, the items that it answers, and whose it is."""

    response: Json
    messages: list[Message]
    items: list[Json]
    client: str
    size: int


class ResponseMemory:
    """The responses of a process, the least recently used dropped first.

    max_bytes: of all of them together, roughly. Only the client that made a response sees it.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self.entries: OrderedDict[str, Stored] = OrderedDict()

    def get(self, name: str, param: str | None = None) -> Stored:
        """The response of this id; ApiError 404 if there is none for the client, `param` names the field that has the id."""
        stored = self.entries.get(name)
        if stored is None or stored.client != CLIENT.get(""):
            raise ApiError(404, f"response {name[:80]} is not stored here, or no longer", param=param)
        self.entries.move_to_end(name)
        return stored

    def put(self, response: Json, messages: Sequence[Message], items: Sequence[Json] = ()) -> None:
        """Keep a response; one that is larger than the whole memory is not kept."""
        # characters of the response, and of the conversation, which repeats the earlier turns
        size = OVERHEAD + 4 * len(json.dumps(response))
        size += sum(OVERHEAD + 4 * len(json.dumps(item)) for item in items)
        size += sum(OVERHEAD + 4 * len(message.model_dump_json()) for message in messages)
        if size > self.max_bytes:
            return
        self.entries[response["id"]] = Stored(response, list(messages), list(items), CLIENT.get(""), size)
        self.n_bytes += size
        while self.n_bytes > self.max_bytes:
            _, dropped = self.entries.popitem(last=False)
            self.n_bytes -= dropped.size

    def delete(self, name: str) -> None:
        """Drop a response; ApiError 404 as for `get`."""
        self.n_bytes -= self.get(name).size
        del self.entries[name]
