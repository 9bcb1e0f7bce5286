"""Chat trace: conversations of several turns with ShareGPT's lengths, and clients that hold them with a server.

Lengths in tokens are log-normal with sigma 1.1, as those of serve_load.py: a user's message has a median of 80 and at most
512, an answer is asked for with a median of 180 and at most 1024, all times a scale (ShareGPT has 161 in and 338 out on
average: Kwon et al. 2023, figure 11). Every conversation begins with the same system message. Each turn sends all earlier
messages again, with the server's own answers, as chat clients do.
"""

import asyncio
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

SYSTEM = "You are a patient assistant. You answer every question in whole sentences, with an example where it helps."
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"]


@dataclass
class ChatOutcome:
    """What the clients saw: seconds to the first text by number of the turn, and from one text to the next."""

    first: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    between: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def draw_chats(n: int, turns: int, *, scale: float, seed: int = 0) -> list[list[tuple[str, int]]]:
    """n conversations: (message, most tokens of its answer) of each turn; always the same for one seed."""
    rng = random.Random(seed)

    def length(median: float, most: int) -> int:
        return max(4, min(int(most * scale), int(scale * median * rng.lognormvariate(0, 1.1))))

    def message() -> str:
        return " ".join(rng.choices(WORDS, k=length(80, 512)))

    return [[(message(), length(180, 1024)) for _ in range(turns)] for _ in range(n)]


async def hold(client: httpx.AsyncClient, model: str, chat: list[tuple[str, int]], outcome: ChatOutcome) -> None:
    """One conversation, turn after turn; an error ends it."""
    messages = [{"role": "system", "content": SYSTEM}]
    for turn, (text, most) in enumerate(chat, start=1):
        messages.append({"role": "user", "content": text})
        body = {"model": model, "messages": messages, "max_tokens": most, "temperature": 0.0, "stream": True}
        try:
            answer = await _read_answer(client, body, turn, outcome)
        except (httpx.HTTPError, ValueError) as error:
            outcome.errors.append(repr(error)[:200])
            return
        outcome.texts.append(answer)
        messages.append({"role": "assistant", "content": answer})


async def _read_answer(client: httpx.AsyncClient, body: dict, turn: int, outcome: ChatOutcome) -> str:
    """The text of a streamed answer, whose times go to the outcome."""
    parts: list[str] = []
    last = time.monotonic()
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise ValueError(f"{response.status_code} {response.text[:100]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(str(event["error"])[:100])
            if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                now = time.monotonic()
                (outcome.between if parts else outcome.first[turn]).append(now - last)
                last = now
                parts.append(text)
    return "".join(parts)


async def hold_all(url: str, model: str, n_clients: int, chats: list[list[tuple[str, int]]]) -> ChatOutcome:
    """Let the clients hold these conversations, each the next one of the list."""
    outcome, begun, left = ChatOutcome(), time.monotonic(), iter(chats)

    async def work(client: httpx.AsyncClient) -> None:
        for chat in left:
            await hold(client, model, chat, outcome)

    limits = httpx.Limits(max_connections=n_clients, max_keepalive_connections=n_clients)
    async with httpx.AsyncClient(base_url=url, timeout=1200, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(work(client) for _ in range(n_clients)))
    outcome.seconds = time.monotonic() - begun
    return outcome


HEAD = "server        clients  tokens/s | first token p50, p95, p99: turn 1 | later turns | between p50, p95, p99 (ms) | errors"


def chat_row(name: str, clients: int, outcome: ChatOutcome, n_tokens: Callable[[str], int]) -> str:
    """One line of the table; n_tokens counts the tokens of a text, by one tokenizer for all servers."""

    def percentiles(seconds: list[float]) -> str:
        if not seconds:
            return "-".rjust(7) * 3
        cuts = statistics.quantiles(seconds * 2, n=100, method="inclusive")  # twice: one value alone has no quantiles
        return "".join(f"{cuts[n - 1] * 1e3:7.0f}" for n in (50, 95, 99))

    later = [value for turn, values in outcome.first.items() if turn > 1 for value in values]
    waits = " |".join(percentiles(values) for values in (outcome.first[1], later, outcome.between))
    rate = sum(map(n_tokens, outcome.texts)) / outcome.seconds
    return f"{name:<14}{clients:>7}{rate:>10.1f} |{waits} |{len(outcome.errors):>4}"
