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


class FairThread:
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


class TokenizeThreads:
    """Short texts do not wait for long ones, and neither for grammars; each thread has a tokenizer of its own."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, queue_size: int, timeout: float) -> None:
        options = {"queue_size": queue_size, "timeout": timeout}
        self.short, self.long = FairThread("short texts", **options), FairThread("long texts", **options)
        self.grammars = FairThread("grammars", **options)
        # tokenizers change state while they work
        self.tokenizers = {self.short: deepcopy(tokenizer), self.long: deepcopy(tokenizer)}
        self.templates: dict[FairThread, ChatTemplate] = {}

    async def encode(self, encode: Callable[..., T], *arguments: object, size: int) -> T:
        """What `encode` makes of a tokenizer and the arguments, which have so many characters."""
        thread = self._thread_for(size)
        return await thread.run(encode, self.tokenizers[thread], *arguments)

    async def encode_chat(self, messages: Messages, tools: Tools, *, size: int) -> list[int]:
        """The tokens of a conversation of so many characters, with the beginning of the answer."""
        thread = self._thread_for(size)
        return await thread.run(self._apply_template, thread, messages, tools)

    def _thread_for(self, size: int) -> FairThread:
        return self.short if size <= SHORT else self.long

    def _apply_template(self, thread: FairThread, messages: Messages, tools: Tools) -> list[int]:
        tokenizer = self.tokenizers[thread]
        if thread not in self.templates:  # which is tried out when it is made
            self.templates[thread] = ChatTemplate(tokenizer)
        return encode_prompt(tokenizer, messages, tools, self.templates[thread])

    def close(self) -> None:
        """No more of it."""
        for thread in (self.short, self.long, self.grammars):
            thread.close()
