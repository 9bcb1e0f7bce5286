"""Threads beside the event loop in which texts become tokens and grammars are compiled, one request after the other."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import TYPE_CHECKING, TypeVar

from genai_pl.data.prompt_tokens import ChatTemplate, Messages, Tools
from genai_pl.generation import encode_prompt
from genai_pl.serving.errors import ApiError
from genai_pl.serving.fair_queue import FairLock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
SHORT = 16_384  # characters that take a few milliseconds


class Lane:
    """One thread; a request that is given up before its turn costs nothing."""

    def __init__(self, name: str, *, queue_size: int, timeout: float) -> None:
        self.pool = ThreadPoolExecutor(1, name)
        self.lock, self.timeout = FairLock(queue_size), timeout

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """What the work gives; ApiError 429 where too many wait, 504 where it takes too long."""
        try:
            return await asyncio.wait_for(self._run(work, *arguments), self.timeout)
        except asyncio.TimeoutError:
            raise ApiError(504, f"not read within {self.timeout:g} seconds") from None

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        async with self.lock.acquire():
            return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    def close(self) -> None:
        """No more of it."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class Reading:
    """Short texts do not wait for long ones, and neither for grammars; each thread has a tokenizer of its own."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, queue_size: int, timeout: float) -> None:
        options = {"queue_size": queue_size, "timeout": timeout}
        self.short, self.long = Lane("short texts", **options), Lane("long texts", **options)
        self.grammars = Lane("grammars", **options)
        # tokenizers change state while they work
        self.tokenizers = {self.short: deepcopy(tokenizer), self.long: deepcopy(tokenizer)}
        self.templates: dict[Lane, ChatTemplate] = {}

    async def tokens(self, encode: Callable[..., T], *arguments: object, size: int) -> T:
        """What `encode` makes of a tokenizer and the arguments, which have so many characters."""
        lane = self._lane(size)
        return await lane.run(encode, self.tokenizers[lane], *arguments)

    async def conversation(self, messages: Messages, tools: Tools, *, size: int) -> list[int]:
        """The tokens of a conversation of so many characters, with the beginning of the answer."""
        lane = self._lane(size)
        return await lane.run(self._encode, lane, messages, tools)

    def _lane(self, size: int) -> Lane:
        return self.short if size <= SHORT else self.long

    def _encode(self, lane: Lane, messages: Messages, tools: Tools) -> list[int]:
        tokenizer = self.tokenizers[lane]
        if lane not in self.templates:  # which is tried out when it is made
            self.templates[lane] = ChatTemplate(tokenizer)
        return encode_prompt(tokenizer, messages, tools, self.templates[lane])

    def close(self) -> None:
        """No more of it."""
        for lane in (self.short, self.long, self.grammars):
            lane.close()
