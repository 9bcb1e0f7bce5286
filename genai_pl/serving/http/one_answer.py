"""One answer to a conversation, for APIs whose answers are lists of blocks or items: its thoughts, text and calls."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import NamedTuple

from fastapi import Request

from genai_pl.serving.answer_streams import Answer
from genai_pl.serving.errors import ApiError
from genai_pl.serving.http.openai import read_chat, submit
from genai_pl.serving.http.reasoning import SplitText, split
from genai_pl.serving.http.responses import ChatFormat, Json
from genai_pl.serving.http.schemas import ChatBody
from genai_pl.serving.http.streaming import cancelled_at_exit, collect, merged, while_connected
from genai_pl.serving.service import Service


class Finished(NamedTuple):
    """A complete answer.

    calls: in OpenAI's shape. finish_reason: stop, length or tool_calls. stop: the stop string that ended it, or None.
    n_reasoning: tokens of thoughts.
    """

    reasoning: str
    text: str
    calls: list[Json]
    finish_reason: str
    stop: str | None
    n_reasoning: int


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Context in which an ApiError names fields as an API does, by what chat completions call them."""
    try:
        yield
    except ApiError as error:
        if (name := names.get(error.param or "")) is not None:
            error.args = (str(error).replace(error.param, name),)
            error.param = name
        raise


class OneAnswer:
    """The answer to one conversation while it is generated.

    n_prompt: tokens of the conversation. n_generated: tokens so far. finished: set once `split_text` or `whole` has ended.
    """

    def __init__(self, service: Service, body: ChatBody, n_prompt: int, answer: Answer, form: ChatFormat) -> None:
        self.service, self.n_prompt, self.answer, self.form = service, n_prompt, answer, form
        self.stops = body.stops
        self.finished: Finished | None = None

    @classmethod
    async def start(
        cls, service: Service, body: ChatBody, request: Request, names: Mapping[str, str] | None = None
    ) -> "OneAnswer":
        """The answer, queued; ApiError as for chat completions.

        names: what the API calls fields of chat completions, for errors
        """
        with renamed(names or {}):
            prompt, form, token_limit = await read_chat(service, body, request)
            [answer] = await submit(service, body, request, [prompt], form, token_limit)
        return cls(service, body, len(prompt), answer, form)

    @property
    def n_generated(self) -> int:
        return self.answer.n_generated

    @property
    def n_cached(self) -> int:
        """Tokens of the conversation that the prefix cache had."""
        return self.answer.n_cached

    async def whole(self, request: Request) -> Finished:
        """The answer once it has ended; cancelled if the client leaves."""
        [outputs] = await while_connected(request.receive, collect([self.answer]))
        return await self._finish(outputs)

    async def split_text(self) -> AsyncGenerator[SplitText, None]:
        """Thoughts and text as they come; with tools all of them at the end, as a call is known only then."""
        outputs = []
        async with cancelled_at_exit([self.answer]), aclosing(merged([self.answer])) as found:
            async for _, output in found:
                outputs.append(output)
                if not self.form.streams_whole_answers:
                    yield self.form.split_text(0, output)
        finished = await self._finish(outputs)
        if self.form.streams_whole_answers:
            yield SplitText(finished.reasoning, finished.text)
        else:
            yield self.form.split_text(0, None)

    async def _finish(self, outputs: list) -> Finished:
        def read() -> Finished:
            choice = self.form.choice(0, outputs, self.answer.finish_reason)
            message, reason = choice["message"], choice["finish_reason"]
            stop = self._stop(outputs) if reason == "stop" and self.stops else None
            thoughts, calls = message.get("reasoning_content", ""), message.get("tool_calls", [])
            n = split(outputs, self.form.make_splitter())[2] if thoughts else 0
            return Finished(thoughts, message["content"] or "", calls, reason, stop, n)

        self.finished = await asyncio.to_thread(read)
        return self.finished

    def _stop(self, outputs: list) -> str | None:
        """The stop string that follows the text in the decoded tokens; None if an end token ended the answer."""
        text = "".join(output.text for output in outputs)
        tokens = [output.token for output in outputs]
        rest = self.service.call_reader.template.tokenizer.decode(tokens, skip_special_tokens=True)[len(text) :]
        return min((stop for stop in self.stops if rest.startswith(stop)), key=len, default=None)


def arguments_of(call: Json) -> dict[str, object]:
    """The arguments of a call as an object."""
    return json.loads(call["function"]["arguments"])
