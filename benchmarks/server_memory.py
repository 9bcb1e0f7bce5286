"""Memory of a server under load: resident, and the part that its prefix cache has filled, sampled while clients ask."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

MIB = 2**20
PREFIX = re.compile(r"^genai_pl_prefix_cache_bytes(?:\{.*\})? (\S+)$", re.MULTILINE)


class Sample(NamedTuple):
    """seconds since the load began, MiB of the process, MiB of keys and values that its prefix cache keeps."""

    seconds: float
    resident: float
    prefix: float

    @property
    def rest(self) -> float:
        """MiB beside the prefix cache, which grows up to its bound (prefix_cache_mib)."""
        return self.resident - self.prefix


def resident(process: int) -> float:
    """MiB of memory that a process has now (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)[1]) / 1024


def prefix_cache(url: str) -> float:
    """MiB in the prefix cache by the server's metrics; 0 for a server that has none, or does not answer now."""
    try:
        found = PREFIX.search(httpx.get(f"{url}/metrics", timeout=30, trust_env=False).text)
    except httpx.HTTPError:
        return 0.0
    return float(found[1]) / MIB if found else 0.0


@contextmanager
def watched(process: int, url: str, *, every: float = 15.0) -> Iterator[list[Sample]]:
    """Context with a list that gets a sample at once, one every so many seconds, and one at the end."""
    samples: list[Sample] = []
    is_over, begun = threading.Event(), time.monotonic()

    def sample() -> None:
        samples.append(Sample(time.monotonic() - begun, resident(process), prefix_cache(url)))

    def watch() -> None:
        while not is_over.wait(every):
            sample()

    sample()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()
        sample()


def memory_table(samples: list[Sample], *, rows: int = 6) -> str:
    """Lines of evenly spaced samples, and how far the second half of them is from flat.

    >>> print(memory_table([Sample(0, 400, 0), Sample(30, 520, 100), Sample(60, 521, 100), Sample(90, 522, 100)], rows=3))
    memory of the server (MiB)   minute  resident  prefix cache  rest
                                    0.0       400             0   400
                                    0.5       520           100   420
                                    1.5       522           100   422
    second half: resident from 521 to 522 (0.2 %), beside the prefix cache from 421 to 422 (0.2 %)
    """
    head = "memory of the server (MiB)"
    lines = [f"{head}   minute  resident  prefix cache  rest"]
    for n in range(rows):
        s = samples[n * (len(samples) - 1) // (rows - 1)]
        lines.append(f"{'':{len(head)}}{s.seconds / 60:9.1f}{s.resident:10.0f}{s.prefix:14.0f}{s.rest:6.0f}")
    half = [s for s in samples if s.seconds >= samples[-1].seconds / 2]

    def spread(values: list[float]) -> str:
        return f"from {min(values):.0f} to {max(values):.0f} ({max(values) / min(values) - 1:.1%})".replace("%", " %")

    whole, rest = spread([s.resident for s in half]), spread([s.rest for s in half])
    return "\n".join([*lines, f"second half: resident {whole}, beside the prefix cache {rest}"])
