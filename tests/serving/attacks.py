"""Attacks on a server, and patient clients beside them: `python -m tests.serving.attacks URL SECONDS`."""

import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random

import httpx

HEAD = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
EACH = 3  # clients of each kind


@dataclass
class Seen:
    """Observations of the clients: statuses by kind of attack, seconds of patient answers and of /health."""

    url: str
    seconds: float
    statuses: Counter = field(default_factory=Counter)
    answers: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.until = time.monotonic() + self.seconds
        self.place = httpx.URL(self.url)
        # Linux has all of 127.0.0.0/8 for itself: who attacks has another address than who is patient
        self.source = "127.0.0.2" if sys.platform == "linux" and self.place.host.startswith("127.") else None

    @property
    def goes_on(self) -> bool:
        """True while the attack goes on."""
        return time.monotonic() < self.until

    def connect(self) -> socket.socket:
        """A plain TCP connection to the server."""
        source = self.source and (self.source, 0)
        return socket.create_connection((self.place.host, self.place.port), timeout=5, source_address=source)

    def post(self, kind: str, path: str, body: object, *, source: str | None = None, timeout: float = 30.0) -> int:
        """The status of the answer, 0 if there is none."""
        try:
            with httpx.Client(transport=httpx.HTTPTransport(local_address=source), timeout=timeout) as client:
                status = client.post(f"{self.url}{path}", json=body).status_code
        except httpx.HTTPError:
            status = 0
        self.statuses[kind, status] += 1
        return status


def sent(seen: Seen, data: bytes, *, drip: bytes = b"", read: int = 0) -> None:
    """Send these bytes, then a few more now and then, until the server closes or the time is over (Slowloris)."""
    with seen.connect() as raw:
        raw.sendall(data)
        raw.settimeout(0.2)
        while seen.goes_on:
            try:
                if read and not raw.recv(read):
                    return
                raw.sendall(drip)
            except TimeoutError:
                pass
            time.sleep(0.2)


def leaving(seen: Seen, path: str, body: object, after: float) -> None:
    """Send requests and disconnect before the answer."""
    data = json.dumps(body).encode()
    with seen.connect() as raw:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        raw.sendall(head.encode() + data)
        time.sleep(after)


def chunked(seen: Seen) -> None:
    """Send a body in chunks of one byte."""
    with seen.connect() as raw:
        raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n")
        raw.recv(1000)


def idle(seen: Seen) -> None:
    """Open many connections, send one request on each and keep them open."""
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(seen.connect()).sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(3)


def ahead(seen: Seen) -> None:
    """Pipeline many requests on one connection."""
    body = b'{"prompt": "x", "max_new_tokens": 1}'
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with seen.connect() as raw:
        raw.sendall(request * 100)
        raw.settimeout(5)
        while raw.recv(65536):
            pass


def storm(seen: Seen) -> None:
    """Open and close connections without a request."""
    for _ in range(50):
        seen.connect().close()
    time.sleep(0.2)


def asks_and_reads_nothing(seen: Seen, path: str, body: object) -> None:
    """Request long answers and read nothing."""
    data = json.dumps(body).encode()
    with seen.connect() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(HEAD.replace(b"/generate", path.encode()) + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        time.sleep(5)


def garbage(seen: Seen) -> None:
    """Send bytes that are not HTTP."""
    with seen.connect() as raw:
        raw.sendall(Random(0).randbytes(2000))
        raw.recv(1000)


LONG, BROKEN = "Once upon a time " * 400, "a?" * 2000
HEAVY = {"prompt": "x", "n": 16, "max_tokens": 4096, "timeout": 20}
GUIDED = {"prompt": "x", "guided_regex": BROKEN}
STREAM = b'{"prompt": "x", "stream": true, "max_new_tokens": 64}'
ATTACKS: dict[str, Callable[[Seen], object]] = {
    "half a head": lambda seen: sent(seen, HEAD),
    "a head byte by byte": lambda seen: sent(seen, b"POST /", drip=b"x"),
    "a body byte by byte": lambda seen: sent(seen, HEAD + b"Content-Length: 99999\r\n\r\n", drip=b" "),
    "reads nothing": lambda seen: sent(seen, HEAD + b"Content-Length: %d\r\n\r\n" % len(STREAM) + STREAM),
    "comes and leaves": lambda seen: leaving(seen, "/generate", {"prompt": LONG[:100], "max_new_tokens": 64}, 0.05),
    "large and away": lambda seen: leaving(seen, "/generate", {"prompt": "x, " * 1_300_000}, 0.1),
    "many texts": lambda seen: seen.post("many texts", "/score", {"text": [LONG[:400]] * 256}, source=seen.source),
    "many answers": lambda seen: seen.post("many answers", "/v1/completions", HEAVY, source=seen.source),
    "bytes": garbage,
    "small chunks": chunked,
    "expressions": lambda seen: seen.post("expressions", "/v1/completions", GUIDED, source=seen.source),
    "numbers": lambda seen: seen.post("numbers", "/v1/completions", {"prompt": [None] * 250_000}, source=seen.source),
    "idle": idle,
    "sent ahead": ahead,
    "a storm": storm,
    "never continued": lambda seen: sent(seen, HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n"),
    "another protocol": lambda seen: sent(seen, HEAD + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n", read=99),
    "many headers": lambda seen: sent(seen, HEAD + b"X: y\r\n" * 100_000, read=99),
    "slow chunks": lambda seen: sent(seen, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", drip=b"1\r\nx\r\n"),
    "large and unread": lambda seen: asks_and_reads_nothing(seen, "/v1/completions", {**HEAVY, "logprobs": 5}),
}


def attack(seen: Seen, kind: str) -> None:
    """Repeat one attack until the time is over."""
    while seen.goes_on:
        try:
            ATTACKS[kind](seen)
        except OSError:  # closed by the server, which is its right
            seen.statuses[kind, 0] += 1
            time.sleep(0.02)


def be_patient(seen: Seen) -> None:
    """Small requests, one after the other, with a retry after each 429."""
    while seen.goes_on:
        began = time.monotonic()
        status = seen.post(
            "patient", "/generate", {"prompt": "Once", "max_new_tokens": 8, "temperature": 1.0}, timeout=60.0
        )
        if status == 200:
            seen.answers.append(time.monotonic() - began)
        elif status == 429:
            time.sleep(1)


def watch(seen: Seen) -> None:
    """Poll /health and record its seconds."""
    while seen.goes_on:
        began = time.monotonic()
        try:
            status = httpx.get(f"{seen.url}/health", timeout=30).status_code
        except httpx.HTTPError:
            status = 0
        seen.statuses["health", status] += 1
        seen.health.append(time.monotonic() - began)
        time.sleep(0.1)


def mix(url: str, seconds: float, *, attackers: int = EACH, patient: int = 4) -> Seen:
    """Run all attacks beside patient clients, and return what the patient clients observed."""
    seen = Seen(url, seconds)
    work = [(attack, seen, kind) for kind in ATTACKS for _ in range(attackers)]
    work += [(be_patient, seen)] * patient + [(watch, seen)]
    threads = [threading.Thread(target=target, args=arguments, daemon=True) for target, *arguments in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 90)
    return seen


def main() -> None:
    """Print the observations."""
    seen = mix(sys.argv[1], float(sys.argv[2]), attackers=int(sys.argv[3]) if len(sys.argv) > 3 else EACH)
    for (kind, status), n in sorted(seen.statuses.items()):
        print(f"{kind:22} {status:4} {n:6}")
    for name, durations in (("patient answers", sorted(seen.answers)), ("health", sorted(seen.health))):
        if durations:
            print(
                f"{name}: {len(durations)}, p50 {durations[len(durations) // 2]:.2f} s, at most {durations[-1]:.2f} s"
            )


if __name__ == "__main__":
    main()
