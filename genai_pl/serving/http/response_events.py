"""Events of a streamed response of OpenAI's Responses API, numbered from 0."""

from collections.abc import Callable, Iterator
from contextlib import aclosing

from genai_pl.serving.errors import as_api_error
from genai_pl.serving.http.one_answer import OneAnswer
from genai_pl.serving.http.response_items import call_item, message_item, reasoning_item, text_part
from genai_pl.serving.http.responses import Json
from genai_pl.serving.http.streaming import Events


class _Item:
    """An item of thoughts or of text that is being streamed, and its events.

    kind: reasoning or text. index: its place in the output.
    """

    def __init__(self, kind: str, index: int) -> None:
        self.kind, self.index, self.text = kind, index, ""
        self.item = (reasoning_item if kind == "reasoning" else message_item)(None, "in_progress")
        self.name = "response.reasoning_text" if kind == "reasoning" else "response.output_text"
        self.place = {"item_id": self.item["id"], "output_index": index, "content_index": 0}

    def _part(self) -> Json:
        return {"type": "reasoning_text", "text": self.text} if self.kind == "reasoning" else text_part(self.text)

    def open(self) -> Iterator[Json]:
        """The events before any text."""
        yield {"type": "response.output_item.added", "output_index": self.index, "item": dict(self.item)}
        yield {"type": "response.content_part.added", **self.place, "part": self._part()}

    def add(self, text: str) -> Json:
        """The event of more text."""
        self.text += text
        extra = {} if self.kind == "reasoning" else {"logprobs": []}
        return {"type": f"{self.name}.delta", **self.place, "delta": text, **extra}

    def close(self, status: str) -> Iterator[Json]:
        """The events after all text; `item` is complete then."""
        self.item |= {"content": [self._part()], "status": status}
        extra = {} if self.kind == "reasoning" else {"logprobs": []}
        yield {"type": f"{self.name}.done", **self.place, "text": self.text, **extra}
        yield {"type": "response.content_part.done", **self.place, "part": self._part()}
        yield {"type": "response.output_item.done", "output_index": self.index, "item": self.item}


async def response_events(answer: OneAnswer, head: Json, finish: Callable[[list[Json]], Json]) -> Events:
    """All events of a response, with their sequence numbers; the first one comes with the first piece of the answer.

    finish: the complete response of the items of the output
    """
    number = -1
    async with aclosing(answer.split_text()) as found:
        first = await anext(found)  # an error before it has its own status
        async with aclosing(_events(answer, head, finish, first, found)) as events:
            try:
                async for event in events:
                    number += 1
                    yield {**event, "sequence_number": number}
            except Exception as error:
                detail = as_api_error(error).body()["error"]
                failed = {"status": "failed", "error": {"code": "server_error", "message": detail["message"]}}
                failure = {"code": detail["type"], "message": detail["message"], "param": None}
                yield {"type": "error", **failure, "sequence_number": number + 1}
                yield {"type": "response.failed", "response": {**head, **failed}, "sequence_number": number + 2}


async def _events(
    answer: OneAnswer, head: Json, finish: Callable[[list[Json]], Json], first: object, found: Events
) -> Events:
    yield {"type": "response.created", "response": head}
    yield {"type": "response.in_progress", "response": head}
    # thoughts and text, each an item that opens with its first piece
    output: list[_Item] = []
    split_text = first
    while split_text is not None:
        for kind, text in (("reasoning", split_text.reasoning), ("text", split_text.text)):
            if text and (not output or output[-1].kind != kind):
                for event in output[-1].close("completed") if output else ():
                    yield event
                output.append(_Item(kind, len(output)))
                for event in output[-1].open():
                    yield event
            if text:
                yield output[-1].add(text)
        split_text = await anext(found, None)
    # an empty answer is a message without text
    is_cut = answer.finished.finish_reason == "length"
    if not output and not answer.finished.calls:
        output.append(_Item("text", 0))
        for event in output[-1].open():
            yield event
    for event in output[-1].close("incomplete" if is_cut else "completed") if output else ():
        yield event
    # calls, and the end
    whole = [one.item for one in output]
    for call in answer.finished.calls:
        item = call_item(call, "completed")
        place = {"output_index": len(whole)}
        yield {
            "type": "response.output_item.added",
            **place,
            "item": {**item, "arguments": "", "status": "in_progress"},
        }
        place["item_id"] = item["id"]
        kind = "response.function_call_arguments"
        yield {"type": f"{kind}.delta", **place, "delta": item["arguments"]}
        yield {"type": f"{kind}.done", **place, "name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.output_item.done", "output_index": len(whole), "item": item}
        whole.append(item)
    yield {"type": "response.incomplete" if is_cut else "response.completed", "response": finish(whole)}
