"""Forward kernels: attention by blocks (Dao 2023, algorithm 1), and the combination of parts for few queries (split keys).

A program owns one block of queries of one head and walks over blocks of keys. It keeps the softmax's running maximum,
denominator and numerator (Milakov and Gimelshein 2018), and rescales the last two whenever the maximum grows, so that
scores never leave the chip. With few queries and many keys there would be too few programs: then keys are split among
programs, and `combine` adds the parts by their log-sum-exps.
"""

import triton
import triton.language as tl

from genai_pl.kernels.flash.blocks import clip, key_blocks, split_global_prefix, step_to, walk
from genai_pl.kernels.flash.common import (
    LN2,
    LOG2E,
    as_column,
    as_row,
    base,
    head_inputs,
    keep,
    load_tile,
    logits,
    marks,
    offsets,
    product,
    store_tile,
    table_of,
    visible,
)


@triton.jit(do_not_specialize=["split_size"])
def forward(
    Q, K, V, OUT, LSE,
    extras, q_stride, k_stride, v_stride, o_stride, bias_stride, sizes, scalars, split_size,
    SPLIT: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The output and log-sum-exp of one block of rows; with SPLIT, of `split_size` of its keys, stacked over the batch.

    Program 0 of the grid counts blocks within (row of the batch, head), program 1 the splits.
    """
    # which rows, and what they may see
    n_blocks = tl.cdiv(sizes.rows, F.BLOCK_M)
    bh = tl.program_id(0) // n_blocks
    b, h = bh // sizes.H, bh % sizes.H
    i0 = (n_blocks - 1 - tl.program_id(0) % n_blocks) * F.BLOCK_M  # the last rows see most: they go first
    row = i0 + tl.arange(0, F.BLOCK_M)
    i = row % sizes.T if F.packed else row
    q_table = table_of(extras.queries, b, sizes.query_table, F)
    k_table = table_of(extras.keys, b, sizes.key_table, F)
    head = head_inputs(extras, b, h, bias_stride, sizes, F)
    blocks = key_blocks(i0, q_table, sizes, F)
    if SPLIT:
        blocks = clip(blocks, tl.program_id(1) * split_size, (tl.program_id(1) + 1) * split_size)

    # the running state of the softmax: numerator, denominator, maximum
    q_tile = base(Q, b, h, i0, q_stride) + offsets(q_stride, F.BLOCK_M, F.BLOCK_D)
    q = load_tile(q_tile, row, sizes.rows, not F.even_m, F.D, F.BLOCK_D)
    k_head, v_head = base(K, b, h // sizes.group, b * 0, k_stride), base(V, b, h // sizes.group, b * 0, v_stride)
    state = (
        tl.zeros([F.BLOCK_M, F.BLOCK_D_V], tl.float32),
        tl.zeros([F.BLOCK_M], tl.float32),
        tl.full([F.BLOCK_M], float("-inf"), tl.float32),
    )
    # keys that all see, then full blocks without a mask, then edges with one
    if F.global_prefix:
        first, blocks = split_global_prefix(blocks, head[5], F.BLOCK_N)
        if SPLIT:
            first = clip(first, tl.program_id(1) * split_size, (tl.program_id(1) + 1) * split_size)
        state = _attend(
            state, q, k_head, v_head, i, q_table, k_table, head, first, k_stride, v_stride, bias_stride, sizes, scalars,
            True, F,
        )  # fmt: skip
    if F.order == 0:
        state = _attend(
            state, q, k_head, v_head, i, q_table, k_table, head, blocks, k_stride, v_stride, bias_stride, sizes, scalars,
            False, F,
        )  # fmt: skip
    if F.hides or SPLIT or not F.even_n:
        state = _attend(
            state, q, k_head, v_head, i, q_table, k_table, head, blocks, k_stride, v_stride, bias_stride, sizes, scalars,
            True, F,
        )  # fmt: skip

    # normalize and write
    acc, total, peak = state
    if F.sinks and not SPLIT:  # one more key, with a value of zero; with split keys `combine` adds it
        sink = tl.load(extras.sinks + h) * LOG2E
        new_peak = tl.maximum(peak, sink)
        old = tl.exp2(peak - new_peak)
        acc, total, peak = acc * old[:, None], total * old + tl.exp2(sink - new_peak), new_peak
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing: zeros, and a log-sum-exp of -inf
    out_b = b
    if SPLIT:
        out_b = b + tl.program_id(1) * (tl.num_programs(0) // n_blocks // sizes.H)
    out_row = (out_b.to(tl.int64) * sizes.H + h) * sizes.rows
    tl.store(LSE + out_row + row, (peak + tl.log2(total)) * LN2, mask=row < sizes.rows)
    o_tile = base(OUT, out_b, h, i0, o_stride) + offsets(o_stride, F.BLOCK_M, F.BLOCK_D_V)
    store_tile(o_tile, acc / total[:, None], row, sizes.rows, F.D_V, F.BLOCK_D_V)


@triton.jit
def _attend(
    state, q, k_head, v_head, i, q_table, k_table, head, blocks, k_stride, v_stride, bias_stride, sizes, scalars,
    EDGES: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The running (numerator, denominator, maximum) after the full blocks of a walk, or (EDGES) after its edges."""
    acc, total, peak = state
    CHECK: tl.constexpr = EDGES and not F.even_n
    of_query = as_column(marks(q_table, i, sizes.T, F)) if EDGES else 0
    if F.bias and not EDGES:
        i = tl.minimum(i, sizes.T - 1)  # rows past the end must not read past the bias
    k_tile, v_tile = offsets(k_stride, F.BLOCK_N, F.BLOCK_D), offsets(v_stride, F.BLOCK_N, F.BLOCK_D_V)
    path = walk(blocks, F.BLOCK_N, EDGES)
    for step in range(path[1]):
        j0 = step_to(path, step, F.BLOCK_N, EDGES)
        j = j0 + tl.arange(0, F.BLOCK_N)
        k = load_tile(k_head + j0.to(tl.int64) * k_stride.t + k_tile, j, sizes.S, CHECK, F.D, F.BLOCK_D)
        scores = product(q, tl.trans(k), tl.zeros([F.BLOCK_M, F.BLOCK_N], tl.float32), F)
        # weights relative to the new maximum, and the factor of everything before
        if F.plain and not EDGES:
            new_peak = tl.maximum(peak, tl.max(scores, 1) * scalars.scale_log2)
            weights = tl.exp2(scores * scalars.scale_log2 - new_peak[:, None])  # one multiply-add
            old = tl.exp2(peak - new_peak)
        else:
            x, _ = logits(scores, i[:, None], j[None, :], head, bias_stride, sizes, scalars, EDGES, F)
            if EDGES:
                of_key = as_row(marks(k_table, j, sizes.S, F))
                x = tl.where(visible(i[:, None], j[None, :], of_query, of_key, head, sizes, F), x, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(x, 1))
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row may have seen nothing yet
            weights = tl.exp2(x - safe[:, None])
            old = tl.exp2(peak - safe)
        # the denominator counts dropped weights too: dropout comes after the softmax
        total = total * old + tl.sum(weights, 1)
        if F.dropout:
            weights = tl.where(keep(i[:, None], j[None, :], head, scalars), weights * scalars.keep_scale, 0.0)
        v = load_tile(v_head + j0.to(tl.int64) * v_stride.t + v_tile, j, sizes.S, CHECK, F.D_V, F.BLOCK_D_V)
        acc = product(weights, v, acc * old[:, None], F)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["n_splits"])
def combine(PARTS, PARTS_LSE, OUT, LSE, extras, o_stride, sizes, n_splits, n_heads, F: tl.constexpr):
    """The output (B, H, T, D) and log-sum-exp of one row from those of each split of the keys.

    PARTS (splits, rows, D_V) and PARTS_LSE (splits, rows), rows ordered by batch row, key head, query head and query.
    """
    # the largest log-sum-exp of all parts
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    d = tl.arange(0, F.BLOCK_D_V)
    bh = row // sizes.T  # rows of a key head are its query heads' rows, one head after the other
    peak = tl.full([], float("-inf"), tl.float32)
    if F.sinks:
        peak = tl.load(extras.sinks + bh % n_heads)
    sink = peak
    for split in range(n_splits):
        peak = tl.maximum(peak, tl.load(PARTS_LSE + split * n_rows + row))
    # parts weighted by their share of the whole denominator
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    acc = tl.zeros([F.BLOCK_D_V], tl.float32)
    total = tl.zeros([], tl.float32)
    if F.sinks:
        total += tl.exp(sink - safe)
    for split in range(n_splits):
        weight = tl.exp(tl.load(PARTS_LSE + split * n_rows + row) - safe)
        acc += weight * tl.load(PARTS + (split * n_rows + row) * F.D_V + d, mask=d < F.D_V, other=0.0)
        total += weight
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(LSE + row, peak + tl.log(total))
    o = base(OUT, bh // n_heads, bh % n_heads, row % sizes.T, o_stride)
    tl.store(o + d, (acc / total).to(OUT.dtype.element_ty), mask=d < F.D_V)
