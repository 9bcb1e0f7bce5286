"""AttentionMask: which keys a query sees, as rules instead of a (T, S) tensor; every backend follows this definition.

A mask is made once per forward pass and shared by all layers. A backend asks it for what it can use: nothing (`sees_all`),
a causal flag (`is_plain_causal`), a dense tensor of booleans or numbers, or the tables of the flash kernels; each is built
at the first request and kept with the mask (`remember`).
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

Built = TypeVar("Built")


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Visibility of S keys to T queries, where query i stands at key position S - T + i: new tokens follow cached ones.

    causal         keys up to the query's own position
    window         keys fewer than `window` positions away; with causal, the last `window` keys, the query's own included
    prefix         the first `prefix` keys ((B,) if they differ) are visible whatever causal and window say
    segments       (B, S) 0 = padding, 1.. = document: equal and not 0; queries are the last T unless `query_segments`
                   (B, T)
    order          (B, S) rank of each position: keys of the query's rank or lower, only lower if `strict`; queries are
                   the last T unless `query_order` (B, T)
    global_prefix  the first `global_prefix` keys ((B,) if they differ) are visible whatever window and segments say, to
                   padding too

    All rules that are set must hold at once; only `prefix` and `global_prefix` widen. What is derived from a mask is kept
    with it, so its tensors must not change afterwards. ValueError for rules that contradict each other.

    >>> AttentionMask(causal=True, segments=torch.tensor([[1, 1, 2]])).dense(3, 3)[0, 0].int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """

    causal: bool = False
    window: int | None = None
    segments: Tensor | None = None
    query_segments: Tensor | None = None
    order: Tensor | None = None
    query_order: Tensor | None = None
    strict: bool = False
    prefix: int | Tensor | None = None
    global_prefix: int | Tensor | None = None
    _memory: dict[str, tuple[Hashable, object]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1: a query's own position is in it")
        if self.query_segments is not None and self.segments is None:
            raise ValueError("query_segments needs segments: they are compared with each other")
        if self.query_order is not None and self.order is None:
            raise ValueError("query_order needs order: they are compared with each other")
        if self.strict and self.order is None:
            raise ValueError("strict needs order: it says how ranks are compared")

    def dense(self, T: int, S: int, device: torch.device | None = None) -> Tensor:
        """True where a query sees a key, (B or 1, 1, T, S), built once for all layers that share the mask.

        >>> AttentionMask(causal=True).dense(2, 3).int().tolist()
        [[[[1, 1, 0], [1, 1, 1]]]]
        """
        return self.remember("dense", (T, S, device), lambda: self._build_dense(T, S, device))

    def additive(self, T: int, S: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """0 where a query sees a key and -inf elsewhere, (B or 1, 1, T, S); built once, as `dense` is."""

        def build() -> Tensor:
            hidden = ~self._build_dense(T, S, device)
            return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))

        return self.remember("additive", (T, S, dtype, device), build)

    def remember(self, name: str, key: Hashable, build: Callable[[], Built]) -> Built:
        """The value of `build()`, kept under `name` until it is requested with another key.

        name: the kind of value. key: what the value depends on besides the mask, such as sizes and device.
        """
        # autograd refuses tensors that were made in inference mode; torch.compile cannot trace the question
        key = (key, not torch.compiler.is_compiling() and torch.is_inference_mode_enabled())
        if name not in self._memory or self._memory[name][0] != key:
            self._memory[name] = (key, build())
        return self._memory[name][1]

    def rows(self, start: int, end: int, S: int, device: torch.device | None = None) -> tuple["AttentionMask", int]:
        """The mask of queries start .. end - 1 of a square of S, and the number of first keys that they need, at least end.

        Attention of these queries to those keys under that mask are these rows of the whole: a process with some of the
        queries calls it so. Built once for all layers. ValueError for a window to both sides, and for order.

        >>> mask, n_keys = AttentionMask(causal=True).rows(1, 3, 4)
        >>> mask.dense(2, n_keys).int().tolist()
        [[[[1, 1, 0], [1, 1, 1]]]]
        """
        return self.remember(f"rows {start}", (end, S, device), lambda: self._build_rows(start, end, S, device))

    def _build_rows(self, start: int, end: int, S: int, device: torch.device | None) -> tuple["AttentionMask", int]:
        """`rows`: under a causal mask the last keys belong to the last queries, as everywhere; else documents are named."""
        if self.order is not None or self.query_segments is not None:
            raise ValueError("rows of a mask with order or query_segments are not defined: its queries are no square")
        segments = self.segments
        if self.causal and self.prefix is None:
            return replace(self, segments=None if segments is None else segments[:, :end].contiguous()), end
        if self.window is not None or (self.causal and self.global_prefix is not None):
            raise ValueError("rows of a mask need causal=True without prefix, or neither window nor global_prefix")
        rules = {} if segments is None else {"query_segments": segments[:, start:end].contiguous()}
        if self.causal:  # a prefix is of rank 0, all else of the rank of its position
            position = torch.arange(S, device=device)[None]
            length = self.prefix.view(-1, 1) if isinstance(self.prefix, Tensor) else self.prefix
            order = position.masked_fill(position < length, 0)  # (B or 1, S)
            queries = position[:, start:end].expand(order.shape[0], -1)
            rules |= {"causal": False, "prefix": None, "order": order, "query_order": queries}
        return replace(self, **rules), S

    def _build_dense(self, T: int, S: int, device: torch.device | None) -> Tensor:
        """The rules one by one, (B or 1, 1, T, S): positions, documents, the global prefix, ranks."""
        visible = self._by_position(T, S, device)
        # its own document only
        if self.segments is not None:
            key = self.segments[:, None, None, :]  # (B, 1, 1, S)
            query = self.segments_of_queries(T, S)[:, None, :, None]  # (B, 1, T, 1)
            visible = visible & (query == key) & (key != 0)
        # the first keys whatever the document, though not the future
        if self.global_prefix is not None:
            key = torch.arange(S, device=device)  # (S,)
            seen = key < (
                self.global_prefix.view(-1, 1, 1, 1) if isinstance(self.global_prefix, Tensor) else self.global_prefix
            )
            if self.causal:
                seen = seen & (key <= torch.arange(S - T, S, device=device)[:, None])
            visible = visible | seen
        # ranks of a permutation
        if self.order is not None:
            key = self.order[:, None, None, :]  # (B, 1, 1, S)
            query = self.order_of_queries(T, S)[:, None, :, None]  # (B, 1, T, 1)
            visible = visible & (key < query if self.strict else key <= query)
        return visible

    def sees_all(self, T: int, S: int) -> bool:
        """True if every query certainly sees every key, so that a backend can drop the mask; reads no tensor."""
        if self._reads_tensors():
            return False
        if self.prefix is not None and self.prefix >= S:
            return True
        return not self._window_hides(T, S) and (not self.causal or T == 1)

    def is_plain_causal(self, T: int, S: int) -> bool:
        """True if the mask is the lower triangle of a square and nothing else; reads no tensor."""
        has_prefix = self.prefix is not None
        if T != S:  # under torch.compile the comparison may be symbolic, which no function of torch takes for False
            return False
        return self.causal and not (has_prefix or self._reads_tensors() or self._window_hides(T, S))

    def _by_position(self, T: int, S: int, device: torch.device | None) -> Tensor:
        """Visibility by causal, window and prefix alone, (B or 1, 1, T, S)."""
        key = torch.arange(S, device=device)  # (S,)
        query = torch.arange(S - T, S, device=device)[:, None]  # (T, 1)
        visible = torch.ones(T, S, dtype=torch.bool, device=device)
        if self.causal:
            visible = visible & (key <= query)
        if self.window is not None:
            visible = visible & ((query - key).abs() < self.window)
        if self.prefix is not None:
            length = self.prefix.view(-1, 1, 1) if isinstance(self.prefix, Tensor) else self.prefix
            visible = visible | (key < length)  # (T, S), or (B, T, S) if lengths differ
        return visible.view(-1, 1, T, S)

    def segments_of_queries(self, T: int, S: int) -> Tensor:
        """The segment of each query, (B, T): that of the last T keys unless `query_segments` is set."""
        if self.query_segments is not None:
            return self.query_segments
        return _last(self.segments, T, S, name="segments")

    def order_of_queries(self, T: int, S: int) -> Tensor:
        """The rank of each query, (B, T): that of the last T keys unless `query_order` is set."""
        if self.query_order is not None:
            return self.query_order
        return _last(self.order, T, S, name="order")

    def _reads_tensors(self) -> bool:
        """True if visibility depends on numbers in tensors, which a backend would have to wait for."""
        return self.segments is not None or self.order is not None or isinstance(self.prefix, Tensor)

    def _window_hides(self, T: int, S: int) -> bool:
        """True if the window is smaller than the row."""
        return self.window is not None and self.window < max(T, S)


EVERYTHING = AttentionMask()


def _last(values: Tensor, T: int, S: int, *, name: str) -> Tensor:
    """The entries of the last T keys, (B, S) -> (B, T); ValueError if there are not S."""
    if values.shape[-1] != S or T > S:
        raise ValueError(f"{name} has {values.shape[-1]} entries, which cannot describe {T} queries and {S} keys")
    return values[:, S - T :]


def positions_from_segments(segments: Tensor) -> Tensor:
    """Positions that restart at 0 wherever the segment id changes, and stay there in padding, (B, S) -> (B, S).

    >>> positions_from_segments(torch.tensor([[1, 1, 2, 2, 0]])).tolist()
    [[0, 1, 0, 1, 0]]
    """
    index = torch.arange(segments.shape[-1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = index - index.masked_fill(~starts, 0).cummax(-1).values
    return positions.masked_fill(segments == 0, 0)  # padding may be longer than learned positions
