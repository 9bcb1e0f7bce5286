"""Prometheus metrics of a server; several workers share them through files, so each answers /metrics for all.

With PROMETHEUS_MULTIPROC_DIR set, prometheus_client keeps every value in a memory-mapped file of the process and /metrics sums
over the files. Names and labels are a contract: deploy/grafana/dashboard.json reads them.
"""

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from genai_pl.serving.settings import FOLDER

# bucket bounds of the histograms
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class HasQueues(Protocol):
    """An engine or an upstream server: requests that wait and that run."""

    @property
    def n_waiting(self) -> int: ...
    @property
    def n_running(self) -> int: ...


class Metrics:
    """Counters, gauges and histograms of one process.

    The first methods are those of EngineObserver, called from the engine's thread; the others are called by the middleware
    (`answered`), by services that look answers up (`cache_lookup`), and once a second (`refresh`). prometheus_client locks.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # a series of creation times beside each counter
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Answers by route and status", "route", "status")
        self.seconds = self._histogram(
            "request_seconds", "From request to the last byte of its answer", SECONDS, "route"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens read")
        self.generated_tokens = self._counter("generated_tokens", "Tokens written")
        self.answers = self._counter("answers", "Answers of the model by what ended them", "reason")
        self.waiting = self._gauge("queue_waiting", "Requests that wait for a slot")
        self.running = self._gauge("queue_running", "Requests that are being answered")
        self.queue_seconds = self._histogram("queue_seconds", "Time that a request waited for a slot", SECONDS)
        self.batch = self._histogram("batch_size", "Rows of each step of the model", BATCHES)
        self.first = self._histogram("first_token_seconds", "From request to its first token", SECONDS)
        self.run_between_steps = self._histogram(
            "inter_token_seconds", "From one token of an answer to the next", STEP_SECONDS
        )
        self.cache = self._counter("cache_lookups", "Lookups in the cache of answers", "result")
        self.memory = self._gauge("memory_bytes", "Memory of the process, and of the accelerator", "kind")
        self.prefixes = self._counter("prefix_lookups", "Prompts looked up in the prefix cache", "result")
        self.prefix_tokens = self._counter("prefix_tokens", "Tokens of prompts that the prefix cache had")
        self.prefix_bytes = self._gauge("prefix_cache_bytes", "Bytes of keys and values in the prefix cache")
        self.adapters = self._gauge("adapters", "Adapters in memory: served, or leaving after a last request", "state")
        for result in ("hit", "miss"):  # so that both series exist before the first lookup
            self.cache.labels(result)
            self.prefixes.labels(result)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"genai_pl_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"genai_pl_{name}", text, labels, registry=self.registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"genai_pl_{name}", text, labels, registry=self.registry, buckets=buckets)

    # the engine's observer

    def queued(self) -> None:
        """Nothing is counted: `refresh` reads the length of the queue."""

    def started(self, waited_s: float) -> None:
        """Seconds in the queue."""
        self.queue_seconds.observe(waited_s)

    def prefix_lookup(self, n_cached: int, n_bytes: int) -> None:
        """One lookup in the prefix cache, and its size after it."""
        self.prefixes.labels("hit" if n_cached else "miss").inc()
        self.prefix_tokens.inc(n_cached)
        self.prefix_bytes.set(n_bytes)

    def first_token(self, seconds: float) -> None:
        """Time to first token."""
        self.first.observe(seconds)

    def token(self, seconds_since_last: float) -> None:
        """Inter-token latency."""
        self.run_between_steps.observe(seconds_since_last)

    def finished(self, reason: str, n_prompt: int, n_generated: int) -> None:
        """An answer by its finish reason, and its tokens."""
        self.answers.labels(reason).inc()
        self.prompt_tokens.inc(n_prompt)
        self.generated_tokens.inc(n_generated)

    def step(self, batch_size: int) -> None:
        """Requests of a decode step."""
        self.batch.observe(batch_size)

    def adapters_changed(self, n_served: int, n_leaving: int) -> None:
        """Adapters in memory."""
        self.adapters.labels("served").set(n_served)
        self.adapters.labels("leaving").set(n_leaving)

    # the server

    def answered(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request by route and status, and the seconds until the last byte of its answer."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def cache_lookup(self, *, hit: bool) -> None:
        """One lookup in the cache of answers."""
        self.cache.labels("hit" if hit else "miss").inc()

    def refresh(self, engine: HasQueues | None) -> None:
        """Set the gauges: queue lengths and memory."""
        if engine is not None:
            self.waiting.set(engine.n_waiting)
            self.running.set(engine.n_running)
        for kind, size in memory().items():
            self.memory.labels(kind).set(size)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format, summed over the workers."""
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        forget_dead(Path(os.environ[FOLDER]))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


def memory() -> Mapping[str, int]:
    """Bytes in use: "resident" of the process, "cuda" of the tensors on the current GPU."""
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc, for example macOS: the peak instead
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    n_bytes = {"resident": resident}
    if torch.cuda.is_available():
        n_bytes["cuda"] = torch.cuda.memory_allocated()
    return n_bytes


def forget_dead(folder: Path) -> None:
    """Remove the gauges of workers that no longer exist; a killed worker cannot do it itself."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(folder))
        except PermissionError:  # the process lives, under another user
            pass
