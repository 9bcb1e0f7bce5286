"""Tokenizer threads: texts become tokens and grammars are compiled beside the event loop, in fair turns.

Tokenizing a long prompt takes seconds and a grammar may take longer. One thread for each kind of work bounds what they take of
the machine; a FairLock in front of each thread decides which request is next.
"""

import asyncio
from collections.abc import Callable, Mapping
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
SHORT = 16_384  # characters of a short text, tokenized in a few milliseconds


def encode_plain(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a text without begin and end tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class FairThread:
    """One thread that works for one request at a time, in turns of clients.

    name: of the thread
    queue_size: requests that may wait
    timeout: seconds of waiting and work together

    A request that is cancelled before its turn costs nothing; one that runs in the thread runs to its end.
    """

    def __init__(self, name: str, *, queue_size: int, timeout: float) -> None:
        self.pool = ThreadPoolExecutor(1, name)
        self.lock, self.timeout = FairLock(queue_size), timeout

    async def run(self, work: Callable[..., T], *arguments: object) -> T:
        """Result of the work; ApiError 429 if too many requests wait, 504 after `timeout`."""
        try:
            return await asyncio.wait_for(self._run(work, *arguments), self.timeout)
        except asyncio.TimeoutError:
            raise ApiError(504, f"not read within {self.timeout:g} seconds") from None

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        async with self.lock.acquire():
            return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)

    def close(self) -> None:
        """End the thread after its current work; queued work is cancelled."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class TokenizeThreads:
    """Three threads, so that short texts wait neither for long ones nor for grammars.

    tokenizer: copied for each thread that tokenizes, as a tokenizer changes state while it works
    queue_size, timeout: of each thread
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, queue_size: int, timeout: float) -> None:
        options = {"queue_size": queue_size, "timeout": timeout}
        self.short, self.long = FairThread("short texts", **options), FairThread("long texts", **options)
        self.grammars = FairThread("grammars", **options)
        self.tokenizers = {self.short: deepcopy(tokenizer), self.long: deepcopy(tokenizer)}
        self.templates: dict[FairThread, ChatTemplate] = {}

    async def encode(self, encode: Callable[..., T], *arguments: object, size: int) -> T:
        """Result of `encode(tokenizer, *arguments)`; `size` in characters chooses the thread."""
        thread = self._thread_for(size)
        return await thread.run(encode, self.tokenizers[thread], *arguments)

    async def encode_chat(
        self, messages: Messages, tools: Tools, variables: Mapping[str, object], *, size: int
    ) -> list[int]:
        """Token ids of a conversation of `size` characters, with the beginning of the assistant's answer."""
        thread = self._thread_for(size)
        return await thread.run(self._apply_template, thread, messages, tools, variables)

    def _thread_for(self, size: int) -> FairThread:
        return self.short if size <= SHORT else self.long

    def _apply_template(
        self, thread: FairThread, messages: Messages, tools: Tools, variables: Mapping[str, object]
    ) -> list[int]:
        tokenizer = self.tokenizers[thread]
        if thread not in self.templates:  # ChatTemplate renders examples when it is made: once for each thread
            self.templates[thread] = ChatTemplate(tokenizer)
        return encode_prompt(tokenizer, messages, tools, self.templates[thread], variables)

    def close(self) -> None:
        """End the threads after their current work."""
        for thread in (self.short, self.long, self.grammars):
            thread.close()
