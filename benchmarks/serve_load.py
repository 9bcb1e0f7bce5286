"""Tokens per second and waiting times of a server under load: python benchmarks/serve_load.py checkpoint=MODEL [options].

Clients ask one after another, each for the next request of one list, over HTTP and as a stream. Lengths are drawn as in
ShareGPT's conversations, which are close to log-normal (Kwon et al. 2023, figure 11: 161 tokens in and 338 out on
average): prompts have a median of 80 and answers of 180 tokens, both with sigma 1.1, at most 512 and 1024, times --scale.

The same requests go to serve.py and, with --simple, to a lock around transformers' generate (serve_simple.py). With
--minutes there is one run of that length instead, with the memory of the server all along (server_memory.py), and the errors.
With --mixed a part of the requests are chats, several answers at once, embeddings and scores; with --attackers there are
this many clients of each kind of tests/serving/attacks.py beside them, from another address, and what they saw is printed:

    python benchmarks/serve_load.py checkpoint=MODEL --clients 64 --minutes 10 --mixed --attackers 1 --scale 0.1

With --turns the clients hold conversations of so many turns instead (chat_trace.py), with this server as it is and without
its prefix cache; with --gguf FILE also with llama.cpp's server (`pip install 'llama-cpp-python[server]'`), with
--transformers with `transformers serve` (`pip install 'transformers[serving]'`), which answers one request at a time, and with
its continuous batching:

    python benchmarks/serve_load.py checkpoint=MODEL --turns 4 --clients 1 16 --requests 1 --scale 0.15 --gguf model.gguf
"""

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

try:
    from benchmarks.chat_trace import HEAD, chat_row, draw_chats, hold_all
    from benchmarks.server_memory import memory_table, watched
except ModuleNotFoundError:  # run as a script
    from chat_trace import HEAD, chat_row, draw_chats, hold_all
    from server_memory import memory_table, watched

ROOT = Path(__file__).parent.parent
SEED = 0


@dataclass
class Outcome:
    """What the clients saw."""

    n_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first text of each answer
    between: list[float] = field(default_factory=list)  # seconds from one text to the next
    seconds: float = 0.0


def vocab_size_of(checkpoint: str) -> int:
    """The number of tokens that a run or model folder knows, 10,000 at most; 1,000 for what is not a folder."""
    for path in (Path(checkpoint, "config.json"), Path(checkpoint, "model", "config.json")):
        if path.exists():
            return min(10_000, json.loads(path.read_text())["vocab_size"])
    return 1000


def draw(n: int, *, scale: float, vocab_size: int) -> Iterator[tuple[list[int], int]]:
    """Prompts and the lengths of their answers, n of them and always the same."""
    rng = random.Random(SEED)

    def length(median: float, most: int) -> int:
        return max(4, min(int(most * scale), int(scale * median * rng.lognormvariate(0, 1.1))))

    for _ in range(n):
        yield [rng.randrange(vocab_size // 10, vocab_size) for _ in range(length(80, 512))], length(180, 1024)


async def ask(client: httpx.AsyncClient, prompt: list[int], n: int, seed: int, outcome: Outcome) -> None:
    """One request; what it took goes to the outcome."""
    body = {"prompt": prompt, "max_tokens": n, "temperature": 0.8, "seed": seed, "stream": True}
    body["stream_options"] = {"include_usage": True}
    last = begun = time.monotonic()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                raise httpx.HTTPError(f"{response.status_code} {response.text[:100]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event, now = json.loads(line.removeprefix("data: ")), time.monotonic()
                if "error" in event:
                    raise httpx.HTTPError(str(event["error"])[:100])
                if event["choices"] and event["choices"][0].get("text"):
                    (outcome.first if last == begun else outcome.between).append(now - last)
                    last = now
                if event.get("usage"):
                    outcome.n_tokens += event["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        outcome.errors.append(f"/v1/completions after {time.monotonic() - begun:.0f} s: {error!r}")
        await asyncio.sleep(0.2)  # a server that is down would be asked for ever


async def ask_whole(client: httpx.AsyncClient, prompt: list[int], n: int, seed: int, outcome: Outcome) -> None:
    """A request of another kind, whose answer comes whole."""
    text = " ".join(map(str, prompt))[:200]
    kinds = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": n}),
        ("/v1/completions", {"prompt": prompt, "max_tokens": n, "n": 4, "logprobs": 3}),
        ("/v1/embeddings", {"input": [text] * 4}),
        ("/score", {"text": [text] * 4}),
    ]
    path, body = kinds[seed // 2 % len(kinds)]
    begun = time.monotonic()
    try:
        reply = await client.post(path, json=body)
        known = reply.status_code == 200 or (reply.status_code == 400 and "chat template" in reply.text)
        if not known:
            raise httpx.HTTPError(f"{reply.status_code} {reply.text[:100]}")
        outcome.n_tokens += reply.json().get("usage", {}).get("completion_tokens", 0)
    except httpx.HTTPError as error:
        outcome.errors.append(f"{path} after {time.monotonic() - begun:.0f} s: {error!r}")
        await asyncio.sleep(0.2)


async def load(
    url: str, n_clients: int, requests: list[tuple[list[int], int]], *, until: float | None, mixed: bool = False
) -> Outcome:
    """Let the clients ask until the list is over or, with a time, over and over until then."""
    outcome, begun, number = Outcome(), time.monotonic(), iter(range(sys.maxsize))

    async def work(client: httpx.AsyncClient) -> None:
        while True:
            n = next(number)
            if n >= len(requests) if until is None else time.monotonic() > until:
                return
            kind = ask_whole if mixed and n % 2 else ask
            await kind(client, *requests[n % len(requests)], seed=n, outcome=outcome)

    limits = httpx.Limits(max_connections=n_clients, max_keepalive_connections=n_clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(work(client) for _ in range(n_clients)))
    outcome.seconds = time.monotonic() - begun
    return outcome


@contextmanager
def server(command: list[str]) -> Iterator[subprocess.Popen]:
    """The server, once it listens."""
    port = int(command[-1].rpartition("=")[2])
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended with status {process.returncode}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def attacked(url: str, n: int, seconds: float) -> Iterator[None]:
    """Inside, this many of each kind of attackers are at work for that time, which print what they saw."""
    if not n or not seconds:
        yield
        return
    process = subprocess.Popen([sys.executable, "-m", "tests.serving.attacks", url, str(seconds), str(n)], cwd=ROOT)
    try:
        yield
        process.wait(120)
    finally:
        process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def row(name: str, clients: int, outcome: Outcome) -> str:
    """One line of the table."""

    def percentiles(seconds: list[float]) -> str:
        if not seconds:
            return "-".rjust(8) * 2
        cuts = statistics.quantiles(seconds * 2, n=20, method="inclusive")  # twice: one value alone has no quantiles
        return f"{cuts[9] * 1e3:8.0f}{cuts[18] * 1e3:8.0f}"

    rate = outcome.n_tokens / outcome.seconds
    waits = percentiles(outcome.first) + percentiles(outcome.between)
    return f"{name:<8}{clients:>8}{rate:>10.1f}{waits}{len(outcome.errors):>8}"


def hold_chats(servers: dict[str, list[str]], checkpoint: str, options: argparse.Namespace) -> None:
    """Print the table of the chat trace, each server with the same conversations; tokens are counted by the checkpoint's
    tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    print(HEAD)
    for name, command in servers.items():
        with server([sys.executable, *command]):
            url = f"http://127.0.0.1:{command[-1].rpartition('=')[2]}"
            model = "" if name == "llama.cpp" else checkpoint if "serve" in command else Path(checkpoint).name
            asyncio.run(hold_all(url, model, 1, [[("Hello", 4)]]))  # what is slow once
            for clients in options.clients:
                # other conversations for each number of clients: none is in the prefix cache
                chats = draw_chats(clients * options.requests, options.turns, scale=options.scale, seed=clients)
                outcome = asyncio.run(hold_all(url, model, clients, chats))
                print(chat_row(name, clients, outcome, lambda text: len(tokenizer.encode(text))), flush=True)
                for error in sorted(set(outcome.errors)):
                    print(f"  {error}")


def peers(checkpoint: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """Commands of the other servers that the options ask for, in float32 as ours; the port is the last word of each."""
    found = {}
    if options.gguf:
        arguments = ["--model", options.gguf, "--n_ctx", "2048", "--interrupt_requests", "false"]
        found["llama.cpp"] = ["-m", "llama_cpp.server", *arguments, f"--port={free_port()}"]
    if options.transformers:
        script = str(Path(sys.executable).with_name("transformers"))
        # without a bound its blocks take most of the memory of the machine
        batching = ["--continuous-batching", "--cb-num-blocks=1024", "--cb-block-size=32", "--cb-max-batch-tokens=256"]
        for name, extra in {"transformers": [], "its batching": batching}.items():
            found[name] = [script, "serve", checkpoint, "--dtype=float32", *extra, f"--port={free_port()}"]
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=lambda value: value.removeprefix("checkpoint="))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=4, help="for each client")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--simple", action="store_true", help="the simple server too")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--mixed", action="store_true", help="requests of all kinds")
    parser.add_argument("--attackers", type=int, default=0, help="of each kind, beside the clients (with --minutes)")
    parser.add_argument("--turns", type=int, help="conversations of so many turns")
    parser.add_argument("--gguf", help="the same model for llama.cpp's server (with --turns)")
    parser.add_argument("--transformers", action="store_true", help="transformers serve too (with --turns)")
    parser.add_argument("--prefill_chunk", type=int, nargs="+", help="one server for each (with --turns)")
    options = parser.parse_args()
    checkpoint = str(Path(options.checkpoint).resolve()) if Path(options.checkpoint).exists() else options.checkpoint
    ours = ["serve.py", f"checkpoint={checkpoint}", f"slots={options.slots}", "queue_size=256", "timeout=600"]
    servers = {"ours": [*ours, "cache=null", f"port={free_port()}"]}
    if options.simple:
        servers["simple"] = ["benchmarks/serve_simple.py", checkpoint, str(free_port())]
    print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; seed {SEED}")
    if options.turns:
        servers = {"ours": [*ours, "cache=null", f"port={free_port()}"]}
        servers["no prefix"] = [*ours, "cache=null", "prefix_cache_mib=0", f"port={free_port()}"]
        for n in options.prefill_chunk or []:
            servers[f"chunk {n}"] = [*ours, "cache=null", f"prefill_chunk={n}", f"port={free_port()}"]
        hold_chats(servers | peers(checkpoint, options), checkpoint, options)
        return
    print("server   clients  tokens/s  first p50, p95  between p50, p95 (ms)  errors")
    for name, command in servers.items():
        with server([sys.executable, *command]) as process:
            url = f"http://127.0.0.1:{command[-1].rpartition('=')[2]}"
            asyncio.run(load(url, 1, [([100, 101], 4)], until=None))  # what is slow once
            for clients in options.clients:
                requests = list(
                    draw(clients * options.requests, scale=options.scale, vocab_size=vocab_size_of(checkpoint))
                )
                until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
                attackers = attacked(url, options.attackers, 60 * (options.minutes or 0))
                with watched(process.pid, url) as samples, attackers:
                    outcome = asyncio.run(load(url, clients, requests, until=until, mixed=options.mixed))
                print(row(name, clients, outcome), flush=True)
                if options.minutes is not None:
                    print(memory_table(samples))
                for error in sorted(set(outcome.errors)):
                    print(f"  {error}")


if __name__ == "__main__":
    main()
