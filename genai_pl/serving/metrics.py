"""What Prometheus is told; with several workers their numbers lie in files, and any of them answers for all."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from genai_pl.serving.settings import FOLDER

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class HasQueues(Protocol):
    """What has requests in it."""

    @property
    def n_waiting(self) -> int: ...
    @property
    def n_running(self) -> int: ...


class Metrics:
    """The numbers of one server; it is the engine's observer, and routes and caches tell it of theirs."""

    def __init__(self) -> None:
        disable_created_metrics()  # a series beside each counter that nobody asks for
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
        for result in ("hit", "miss"):
            self.cache.labels(result)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"genai_pl_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"genai_pl_{name}", text, labels, registry=self.registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"genai_pl_{name}", text, labels, registry=self.registry, buckets=buckets)

    # the engine's observer

    def queued(self) -> None:
        """A request waits; how many do is read when it is asked for."""

    def started(self, waited_s: float) -> None:
        self.queue_seconds.observe(waited_s)

    def first_token(self, seconds: float) -> None:
        self.first.observe(seconds)

    def token(self, seconds_since_last: float) -> None:
        self.run_between_steps.observe(seconds_since_last)

    def finished(self, reason: str, n_prompt: int, n_generated: int) -> None:
        self.answers.labels(reason).inc()
        self.prompt_tokens.inc(n_prompt)
        self.generated_tokens.inc(n_generated)

    def step(self, batch_size: int) -> None:
        self.batch.observe(batch_size)

    # the server

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(route, status).inc()
        self.seconds.labels(route).observe(seconds)

    def cache_lookup(self, *, hit: bool) -> None:
        """The cache was asked."""
        self.cache.labels("hit" if hit else "miss").inc()

    def refresh(self, engine: HasQueues | None) -> None:
        """Set what is a state rather than an event."""
        if engine is not None:
            self.waiting.set(engine.n_waiting)
            self.running.set(engine.n_running)
        for kind, size in memory().items():
            self.memory.labels(kind).set(size)

    def text(self) -> bytes:
        """Everything in Prometheus's text format, of all workers."""
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        forget_dead(Path(os.environ[FOLDER]))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)


def memory() -> Mapping[str, int]:
    """Bytes in use now: of the process, and of each accelerator's tensors."""
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no Linux: the most it ever was
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    n_bytes = {"resident": resident}
    if torch.cuda.is_available():
        n_bytes["cuda"] = torch.cuda.memory_allocated()
    return n_bytes


def forget_dead(folder: Path) -> None:
    """Take what lives only with a process out of the sums, for processes that were killed."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(folder))
        except PermissionError:
            pass
