"""Captured decoding: the step of one token for each row, recorded once as a CUDA graph and replayed for the tokens after it.

Eager code launches some hundred kernels a token, and a GPU waits for each launch. A graph launches all of them at once, but
its tensors have one size and one place: token, position and column are copied into buffers before a replay, the logits are
copied out after it, and attention reads all columns of the KV cache, those that are empty under a mask. The new token stands
in the last column, where a mask expects the query; for later steps it is stored in its own column too.

What a graph cannot do runs eagerly: prefills, other kinds of models and caches, adapters by row, the last column of a cache.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from genai_pl.distributed.dtensor import is_dtensor
from genai_pl.kernels import positions_from_segments
from genai_pl.kernels.attention import log_once
from genai_pl.models import Decoder
from genai_pl.models.decoder import has_uniform_steps
from genai_pl.models.kv_cache import KVCache

Recorder = Callable[[Callable[[], None]], Callable[[], None]]
Clock = Callable[[Callable[[], object]], float]

WORTH = 32  # steps: recording takes the time of some
WARM_UP = 3  # calls before one is recorded: kernels are compiled and chosen


def record_graph(run: Callable[[], None]) -> Callable[[], None]:
    """The replay of a function's kernels, which read and write the tensors that they read and wrote when recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def gpu_seconds(run: Callable[[], object]) -> float:
    """The seconds of a call, until the GPU has done it: the best of a few."""
    best = float("inf")
    for _ in range(WARM_UP):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def capturable(model: object) -> bool:
    """True if the steps of a model with a `KVCache` can be recorded: every tensor has one size, and one process computes."""
    if not has_uniform_steps(model) or model.fused is not None:
        return False
    return not any(is_dtensor(p) for p in model.parameters())


class StaticColumns:
    """The KV cache of a captured step: new keys and values go where `column` says, and all columns come back.

    The interface of `KVCache` as far as a pass calls it.
    """

    def __init__(self, cache: KVCache) -> None:
        self.k, self.v = cache.k, cache.v
        # until a token is loaded, the last: recording writes there, and must not write over the past
        self.column = torch.full((1,), cache.max_length - 1, device=cache.k.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values (B, K, columns, D), the new ones (B, K, 1, D) last, and in their column for later steps."""
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            buffer.index_copy_(2, self.column, new)
            buffer[:, :, -1:] = new
        return self.k[layer], self.v[layer]


class CapturedStep:
    """Logits (B, V) after one more token of each row, from buffers of one KV cache.

    model: what `capturable` allows. record: turns a function into its replay.
    """

    def __init__(self, model: Decoder, cache: KVCache, record: Recorder) -> None:
        B, columns, device = cache.k.shape[1], cache.max_length, cache.k.device
        self.model, self.columns = model, StaticColumns(cache)
        self.token = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.segments = torch.zeros(B, columns, dtype=torch.long, device=device)
        self.segments[:, -1] = 1  # a query that sees nothing would be a row of zeros
        self.logits: Tensor | None = None
        self.replay = record(self._run)

    def fits(self, cache: KVCache) -> bool:
        """True for the cache whose buffers were recorded, while it has a column beside the last."""
        return cache.k is self.columns.k and cache.length < cache.max_length - 1

    def load(self, cache: KVCache, token: Tensor, segment: Tensor | None) -> None:
        """Copy in what the next step reads: token (B, 1) of segment (B, 1) after the tokens of the cache."""
        past, ids = cache.length, cache.segments(segment, 1)  # (B, past + 1)
        self.token.copy_(token)
        self.columns.column.fill_(past)
        self.segments[:, past:-1] = 0
        if ids is None:
            self.segments[:, :past] = 1
            self.position.fill_(past)
            return
        self.segments[:, :past] = ids[:, :past]
        self.segments[:, -1:] = ids[:, past:]
        self.position.copy_(positions_from_segments(ids)[:, -1:])

    def __call__(self, cache: KVCache, token: Tensor, segment: Tensor | None) -> Tensor:
        """Logits (B, V) after token (B, 1); the cache advances."""
        self.load(cache, token, segment)
        self.replay()
        cache.advance(1)
        return self.logits.clone()  # the next replay writes over it

    def _run(self) -> None:
        """The step, on buffers alone: this is what is recorded."""
        kind = self.token.device.type
        products = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        # casts belong to the graph: autocast frees those that it has cached
        with torch.autocast(kind, **products, cache_enabled=False):
            x = self.model.embed_inputs(self.token, self.position)
            x = self.model.forward_blocks(x, self.position, self.segments, cache=self.columns)
            logits = self.model.logits(x)[:, -1]
        if self.logits is None:
            self.logits = torch.empty_like(logits)
        self.logits.copy_(logits)


class CapturedSteps:
    """The steps of one decode state, by a graph where that is faster: decided once, when the first could be replayed.

    record, clock: `record_graph` and `gpu_seconds`, or what takes their place without a GPU.
    """

    def __init__(self, record: Recorder = record_graph, clock: Clock = gpu_seconds) -> None:
        self.record, self.clock = record, clock
        self.captured: CapturedStep | None = None
        self.given_up = False

    def step(self, model: object, cache: object, token: Tensor, segment: Tensor | None) -> Tensor | None:
        """Logits (B, V) after token (B, 1), with the cache advanced; None where the caller must compute them."""
        if self.given_up or token.shape[1] != 1 or type(cache) is not KVCache or cache.length == 0:
            return None
        if self.captured is None or self.captured.columns.k is not cache.k:  # rows were dropped, or a cache is new
            self.captured = None
            if not self._capture(model, cache, token, segment):
                return None
        return self.captured(cache, token, segment) if self.captured.fits(cache) else None

    def _capture(self, model: Decoder, cache: KVCache, token: Tensor, segment: Tensor | None) -> bool:
        """Record a step and compare its time with an eager one's; False where it cannot be, or does not pay."""
        if not capturable(model):
            self.given_up = True
            return False
        if cache.max_length - cache.length < WORTH:
            return False
        try:
            captured = CapturedStep(model, cache, self.record)
            captured.load(cache, token, segment)
            seconds = [self.clock(run) for run in (captured.replay, lambda: _eager(model, cache, token, segment))]
        except (RuntimeError, NotImplementedError) as error:
            self.given_up = True
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log_once(f"decoding    without CUDA graphs: {reason}")
            return False
        ratio = seconds[1] / max(seconds[0], 1e-9)
        self.given_up = ratio < 1
        verdict = "eager steps, as CUDA graphs are slower" if self.given_up else "CUDA graphs"
        log_once(f"decoding    {verdict} ({1e3 * seconds[0]:.2f} ms a token, eager {1e3 * seconds[1]:.2f})")
        self.captured = None if self.given_up else captured
        return not self.given_up


def _eager(model: Decoder, cache: KVCache, token: Tensor, segment: Tensor | None) -> None:
    """The same step without a graph, after which the cache is as before."""
    hidden = model.features(token, segment, cache=cache)
    model.logits(hidden[:, -1:])
    cache.rewind(1)
