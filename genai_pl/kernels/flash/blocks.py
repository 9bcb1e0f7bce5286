"""Blocks of keys that a block of queries visits, and blocks of queries that a block of keys visits.

Both are (start, full_start, full_end, end): blocks in [full_start, full_end) are visible throughout, those before and
after are edges, everything else is skipped. Start and the bounds of the full part are multiples of the block. This is where
a causal or windowed mask saves its time: a kernel loops over the full part without a mask, and over the edges with one.
"""

import triton
import triton.language as tl

from genai_pl.kernels.flash import mask_tables as flash_tables

SEEN_START, SEEN_END = tl.constexpr(flash_tables.SEEN_START), tl.constexpr(flash_tables.SEEN_END)
FULL_START, FULL_END = tl.constexpr(flash_tables.FULL_START), tl.constexpr(flash_tables.FULL_END)


@triton.jit
def key_blocks(i0, table, sizes, F: tl.constexpr):
    """The blocks of keys that the F.BLOCK_M queries from i0 see; from tables if the mask needs them, else by arithmetic."""
    if F.tables:
        rows = tl.minimum(i0 + tl.arange(0, F.BLOCK_M), sizes.rows - 1)
        return _from_table(table, rows % sizes.T if F.packed else rows, sizes.T, F.BLOCK_N, F)
    # everything, then narrowed: outside by what the last query sees at most, inside by what all queries see
    start = 0
    full_start = 0
    end = sizes.S
    full_end = sizes.S
    first = (sizes.S - sizes.T) + (0 if F.packed else i0)  # the positions of the queries
    last = sizes.S - 1
    if not F.packed:
        last = tl.minimum(first + F.BLOCK_M, sizes.S) - 1
    if F.window:
        start = first - sizes.window + 1
        full_start = last - sizes.window + 1
        end = last + sizes.window
        full_end = first + sizes.window
    if F.causal:
        end = last + 1
        full_end = first + 1
    return _align_to_blocks(start, full_start, full_end, end, sizes.S, F.BLOCK_N, F)


@triton.jit
def query_blocks(j0, table, sizes, F: tl.constexpr):
    """The blocks of queries that see the F.BLOCK_N keys from j0, in the same form."""
    if F.tables:
        keys = tl.minimum(j0 + tl.arange(0, F.BLOCK_N), sizes.S - 1)
        return _from_table(table, keys, sizes.S, F.BLOCK_M, F)
    start = 0
    full_start = 0
    end = sizes.T
    full_end = sizes.T
    # the same as above with queries and keys exchanged: a query at a key's position is its first under a causal mask
    first = j0 - (sizes.S - sizes.T)
    last = tl.minimum(first + F.BLOCK_N, sizes.T) - 1
    if F.window:
        start = first - sizes.window + 1
        full_start = last - sizes.window + 1
        end = last + sizes.window
        full_end = first + sizes.window
    if F.causal:
        start = first
        full_start = last
    return _align_to_blocks(start, full_start, full_end, end, sizes.T, F.BLOCK_M, F)


@triton.jit
def _from_table(table, index, length, BLOCK: tl.constexpr, F: tl.constexpr):
    """Bounds from the intervals of the block's members: the union of what is seen, the intersection of what is full."""
    start = tl.min(tl.load(table + SEEN_START * length + index), 0)
    end = tl.max(tl.load(table + SEEN_END * length + index), 0)
    full_start = tl.max(tl.load(table + FULL_START * length + index), 0)
    full_end = tl.min(tl.load(table + FULL_END * length + index), 0)
    # the intervals lie inside the sequence, so the length needs no bound here
    return _align_to_blocks(start, full_start, full_end, end, 2147483647, BLOCK, F)


@triton.jit
def _align_to_blocks(start, full_start, full_end, end, length, BLOCK: tl.constexpr, F: tl.constexpr):
    """Round intervals to multiples of the block: the seen one outwards, the full one inwards and inside the seen one."""
    start = tl.maximum(start, 0) // BLOCK * BLOCK
    end = tl.maximum(tl.minimum(end, length), 0)
    if F.order > 0:  # ranks may hide a key anywhere: all blocks are edges
        return start, start, start, end
    full_start = tl.minimum(tl.cdiv(tl.maximum(full_start, 0), BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    full_start = tl.maximum(full_start, start)
    full_end = tl.maximum(tl.minimum(full_end, length), 0) // BLOCK * BLOCK
    return start, full_start, tl.maximum(full_end, full_start), end


@triton.jit
def split_global_prefix(blocks, global_prefix, BLOCK: tl.constexpr):
    """The blocks of the first `global_prefix` keys, all of them edges, and the other blocks without them."""
    start, full_start, full_end, end = blocks
    boundary = tl.cdiv(global_prefix, BLOCK) * BLOCK
    full_start = tl.maximum(full_start, boundary)
    return (boundary * 0, boundary, boundary, boundary * 0), (
        tl.maximum(start, boundary),
        full_start,
        tl.maximum(full_end, full_start),
        end,
    )


@triton.jit
def clip(blocks, first, last):
    """The part of the blocks in [first, last), multiples of the block: one program's share of split keys."""
    start, full_start, full_end, end = blocks
    full_start = tl.minimum(tl.maximum(full_start, first), last)
    full_end = tl.minimum(tl.maximum(full_end, first), last)
    return tl.maximum(start, first), full_start, full_end, tl.minimum(end, last)


@triton.jit
def walk(blocks, BLOCK: tl.constexpr, EDGES: tl.constexpr):
    """The path through the blocks of one kind, for `step_to`: (first, number, number before the gap, length of the gap).

    Edges lie on both sides of the full part, which is their gap.
    """
    start, full_start, full_end, end = blocks
    if EDGES:
        n_left = tl.maximum(full_start - start, 0) // BLOCK
        n_right = tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)
        return start, n_left + n_right, n_left, full_end - full_start
    return full_start, (full_end - full_start) // BLOCK, 0, 0


@triton.jit
def step_to(walk, step, BLOCK: tl.constexpr, EDGES: tl.constexpr):
    """The first index of the block that a step of a path visits."""
    first, _, n_left, gap = walk
    index = first + step * BLOCK
    if EDGES:
        index += tl.where(step >= n_left, gap, 0)
    return tl.multiple_of(index, BLOCK)
