"""Mask tables: a mask's documents, prefixes and ranks as integers per query and per key, which the kernels read.

For every query: the interval of keys that it sees at most, the interval that it surely sees, its segment and rank; for every
key the same of queries. A kernel takes the union and intersection over a block to decide which blocks to visit, and compares
segments and ranks in edges. Tables are built in a few tensor operations, once per mask, for all layers.
"""

import torch
from torch import Tensor

from genai_pl.kernels.mask import AttentionMask

# rows of a table: outside [seen) everything is hidden, inside [full) everything is visible but for `order`; [seen) of a query
# leaves out the first GLOBAL_PREFIX keys
SEEN_START, SEEN_END, FULL_START, FULL_END, SEGMENT, RANK, PREFIX, GLOBAL_PREFIX = range(8)
Interval = tuple[Tensor, Tensor]


def mask_tables(mask: AttentionMask, T: int, S: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Tables (B or 1, rows, T) of the queries and (B or 1, rows, S) of the keys; None twice for a mask that needs none.

    The last row, GLOBAL_PREFIX, is there only if the mask has such keys.
    """
    if mask.prefix is None and mask.segments is None and mask.order is None and mask.global_prefix is None:
        return None, None
    return mask.remember("tables", (T, S, device), lambda: _build(mask, T, S, device))


def _build(mask: AttentionMask, T: int, S: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Both tables, rule by rule: positions, documents, ranks, global prefix."""
    # by position
    prefix = _length(mask.prefix, S, device)  # (B or 1, 1)
    seen, full = _keys_by_position(mask, prefix, T, S)
    seen_by = full_by = _queries_by_position(mask, prefix, T, S)
    key_segment = query_segment = key_rank = query_rank = torch.zeros_like(prefix)
    # by document and rank
    if mask.segments is not None:
        key_segment, query_segment = mask.segments, mask.segments_of_queries(T, S)
        seen, full = _meet(seen, full, *_runs(query_segment, key_segment))
        seen_by, full_by = _meet(seen_by, full_by, *_runs(key_segment, query_segment))
    if mask.order is not None:
        key_rank, query_rank = mask.order, mask.order_of_queries(T, S)
    # keys that are visible whatever the rules above say
    lengths = [prefix]
    if mask.global_prefix is not None:
        global_prefix = _length(mask.global_prefix, S, device)
        lengths.append(global_prefix)
        seen_by, full_by = _by_all(seen_by, full_by, mask, global_prefix, T, S)
    queries = _stack([*seen, *full, query_segment, query_rank, *lengths], T)
    return queries, _stack([*seen_by, *full_by, key_segment, key_rank, *lengths], S)


def _length(length: int | Tensor | None, S: int, device: torch.device) -> Tensor:
    """A length as a tensor (B or 1, 1), at most S; 0 for None."""
    if isinstance(length, Tensor):
        return length.clamp(0, S).view(-1, 1)
    return torch.full((1, 1), max(0, min(length or 0, S)), device=device)  # no copy that a GPU would wait for


def _by_all(
    seen_by: Interval, full_by: Interval, mask: AttentionMask, global_prefix: Tensor, T: int, S: int
) -> tuple[Interval, Interval]:
    """The queries of each key, where the first `global_prefix` keys are seen by all queries (causal: from their position on)."""
    key = torch.arange(S, device=global_prefix.device)[None]  # (1, S)
    start = (key - (S - T)).clamp(0, T) if mask.causal else torch.zeros_like(key)
    free = key < global_prefix  # (B or 1, S)
    first = torch.where(free, torch.minimum(start, seen_by[0]), seen_by[0])  # a prefix may reach further
    end, full_end = (torch.where(free, T, interval[1]) for interval in (seen_by, full_by))
    return (first, end), (torch.where(free, start, full_by[0]), full_end)


def _stack(rows: list[Tensor], length: int) -> Tensor:
    """A table (B or 1, rows, length) of int32 from rows that broadcast to (B, length)."""
    n = max(row.shape[0] for row in rows)
    return torch.stack([row.to(torch.int32).expand(n, length) for row in rows], dim=1)


def _keys_by_position(mask: AttentionMask, prefix: Tensor, T: int, S: int) -> tuple[Interval, Interval]:
    """The keys that causal, window and prefix show to each query, and a part of them without a gap, intervals (B or 1, T)."""
    query = torch.arange(S - T, S, device=prefix.device)[None]  # (1, T)
    start, end = torch.zeros_like(query), torch.full_like(query, S)
    if mask.window is not None:
        start, end = query - mask.window + 1, query + mask.window
    if mask.causal:
        end = query + 1
    start, end = start.clamp(0, S), end.clamp(0, S)
    joins = start <= prefix  # else a gap lies between prefix and window
    longer = torch.maximum(end, prefix)
    seen = torch.where(prefix > 0, 0, start), longer
    return seen, (torch.where(joins, 0, start) if mask.prefix is not None else start, torch.where(joins, longer, end))


def _queries_by_position(mask: AttentionMask, prefix: Tensor, T: int, S: int) -> Interval:
    """The queries to which causal, window and prefix show each key, an interval (B or 1, S)."""
    key = torch.arange(T - S, T, device=prefix.device)[None]  # (1, S): where a query at the key's position stands
    start, end = torch.zeros_like(key), torch.full_like(key, T)
    if mask.window is not None:
        start, end = key - mask.window + 1, key + mask.window
    if mask.causal:
        start = key
    free = key + (S - T) < prefix
    return torch.where(free, 0, start.clamp(0, T)), torch.where(free, T, end.clamp(0, T))


def _runs(ids: Tensor, haystack: Tensor) -> tuple[Interval, Interval]:
    """The span of each id's occurrences in haystack (B, M), ids (B, N); twice, the second empty if the span has gaps.

    By sorting: a span without gaps is as long as the number of occurrences. Id 0 is padding and occurs nowhere.
    """
    ids, haystack = (x.contiguous() for x in _same_batch(ids, haystack))
    M = haystack.shape[1]
    ordered, index = haystack.sort(stable=True)
    left, right = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)
    start = index.gather(1, left.clamp(max=M - 1))
    end = index.gather(1, (right - 1).clamp(min=0)) + 1
    occurs = (right > left) & (ids != 0)
    has_no_gap = occurs & (end - start == right - left)
    spans = [(torch.where(here, start, M), torch.where(here, end, 0)) for here in (occurs, has_no_gap)]
    return spans[0], spans[1]


def _same_batch(a: Tensor, b: Tensor) -> Interval:
    """Both with the larger batch size; one of them may be 1."""
    n = max(a.shape[0], b.shape[0])
    return a.expand(n, -1), b.expand(n, -1)


def _meet(seen: Interval, full: Interval, seen_too: Interval, full_too: Interval) -> tuple[Interval, Interval]:
    """The intersections of two seen intervals and of two full ones."""
    (a, b), (c, d) = (
        (torch.maximum(x[0], y[0]), torch.minimum(x[1], y[1])) for x, y in ((seen, seen_too), (full, full_too))
    )
    return (a, b), (c, d)
