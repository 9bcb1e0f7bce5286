"""Backward kernels: attention by blocks (Dao 2023, algorithm 2), where each gradient has programs that own it.

With weights p = exp(score - lse), which are computed again from q and k, and delta = sum(o * d_o) per query:

    dV = p^T d_o        d_p = d_o V^T        d_score = p (d_p - delta)        dQ = d_score K        dK = d_score^T Q

A sink is a key whose value, and so d_p, is zero: its gradient is the sum of -p delta, with p = exp(sink - lse).

One kernel owns blocks of keys and loops over queries (dK, dV), one owns blocks of queries and loops over keys (dQ), one owns
tiles of the bias. Scores are computed once in each; in return there are no atomics, and gradients are the same bit for bit
in every run.
"""

import triton
import triton.language as tl

from genai_pl.kernels.flash.blocks import key_blocks, query_blocks, split_global_prefix, step_to, walk
from genai_pl.kernels.flash.common import (
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


@triton.jit
def row_sums(
    OUT, D_OUT, LSE, D_LSE, LSE2, DELTA, D_SINKS, extras, o_stride, do_stride, sizes,
    HAS_D_LSE: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """delta = sum(o * d_o) - d_lse of each query, and lse in log2 units, into padded buffers.

    A gradient of the log-sum-exp enters as -d_lse: d lse / d score is the weight itself. Rows that see no key or do not
    exist get lse = +inf, which makes all their weights 0. D_SINKS gets the block's share of its head's gradient.
    """
    n_blocks = sizes.padded // F.BLOCK_M
    bh = tl.program_id(0) // n_blocks
    i0 = tl.program_id(0) % n_blocks * F.BLOCK_M
    b, h = bh // sizes.H, bh % sizes.H
    i = i0 + tl.arange(0, F.BLOCK_M)
    # delta = sum over channels of o * d_o
    o_tile = base(OUT, b, h, i0, o_stride) + offsets(o_stride, F.BLOCK_M, F.BLOCK_D_V)
    do_tile = base(D_OUT, b, h, i0, do_stride) + offsets(do_stride, F.BLOCK_M, F.BLOCK_D_V)
    o = load_tile(o_tile, i, sizes.T, True, F.D_V, F.BLOCK_D_V).to(tl.float32)
    d_o = load_tile(do_tile, i, sizes.T, True, F.D_V, F.BLOCK_D_V).to(tl.float32)
    delta = tl.sum(o * d_o, 1)
    row = bh.to(tl.int64) * sizes.T + i
    if HAS_D_LSE:
        delta -= tl.load(D_LSE + row, mask=i < sizes.T, other=0.0)
    lse = tl.load(LSE + row, mask=i < sizes.T, other=float("-inf"))
    out = bh.to(tl.int64) * sizes.padded + i
    tl.store(DELTA + out, delta)
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(LSE2 + out, lse2)
    if F.sinks:
        weight = tl.exp2(tl.load(extras.sinks + h) * LOG2E - lse2)
        tl.store(D_SINKS + tl.program_id(0), -tl.sum(weight * delta, 0))


@triton.jit
def key_value_gradients(
    Q, K, V, D_OUT, LSE2, DELTA, D_K, D_V,
    extras, q_stride, k_stride, v_stride, do_stride, dk_stride, dv_stride, bias_stride, sizes, scalars, n_heads,
    F: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, summed over `n_heads` query heads: all that share the key head, or one of them.

    With one, the launcher sums over heads afterwards.
    """
    # the block of keys and values, which stays in registers
    n_blocks = tl.cdiv(sizes.S, F.BLOCK_N)
    n_out = sizes.H // n_heads
    out = tl.program_id(0) // n_blocks
    b, h_out = out // n_out, out % n_out
    j0 = tl.program_id(0) % n_blocks * F.BLOCK_N
    j = j0 + tl.arange(0, F.BLOCK_N)
    q_table = table_of(extras.queries, b, sizes.query_table, F)
    k_table = table_of(extras.keys, b, sizes.key_table, F)
    h_key = h_out * n_heads // sizes.group
    k_tile = base(K, b, h_key, j0, k_stride) + offsets(k_stride, F.BLOCK_N, F.BLOCK_D)
    v_tile = base(V, b, h_key, j0, v_stride) + offsets(v_stride, F.BLOCK_N, F.BLOCK_D_V)
    k = load_tile(k_tile, j, sizes.S, not F.even_n, F.D, F.BLOCK_D)
    v = load_tile(v_tile, j, sizes.S, not F.even_n, F.D_V, F.BLOCK_D_V)
    blocks = query_blocks(j0, k_table, sizes, F)
    # over query heads and their blocks of queries
    sums = tl.zeros([F.BLOCK_N, F.BLOCK_D], tl.float32), tl.zeros([F.BLOCK_N, F.BLOCK_D_V], tl.float32)
    for g in range(n_heads):
        h = h_out * n_heads + g
        head = head_inputs(extras, b, h, bias_stride, sizes, F)
        row = (b * sizes.H + h).to(tl.int64) * sizes.padded
        q_head, do_head = base(Q, b, h, b * 0, q_stride), base(D_OUT, b, h, b * 0, do_stride)
        if F.hides or not F.even_m:  # edges first: the loop without masks keeps its registers to the end
            sums = _keys_of(
                sums, k, v, q_head, do_head, LSE2 + row, DELTA + row, j, q_table, k_table, head, blocks, q_stride,
                do_stride, bias_stride, sizes, scalars, True, F,
            )  # fmt: skip
        if F.order == 0:
            sums = _keys_of(
                sums, k, v, q_head, do_head, LSE2 + row, DELTA + row, j, q_table, k_table, head, blocks, q_stride,
                do_stride, bias_stride, sizes, scalars, False, F,
            )  # fmt: skip
    dk_tile = base(D_K, b, h_out, j0, dk_stride) + offsets(dk_stride, F.BLOCK_N, F.BLOCK_D)
    dv_tile = base(D_V, b, h_out, j0, dv_stride) + offsets(dv_stride, F.BLOCK_N, F.BLOCK_D_V)
    store_tile(dk_tile, sums[0] * scalars.scale, j, sizes.S, F.D, F.BLOCK_D)
    store_tile(dv_tile, sums[1], j, sizes.S, F.D_V, F.BLOCK_D_V)


@triton.jit
def _keys_of(
    sums, k, v, q_head, do_head, lse2, delta, j, q_table, k_table, head, blocks, q_stride, do_stride, bias_stride, sizes,
    scalars, EDGES: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """(dK, dV) plus the share of one head's full blocks of queries, or of its edges; tiles are keys by queries."""
    dk, dv = sums
    CHECK: tl.constexpr = EDGES and not F.even_m
    of_key = as_column(marks(k_table, j, sizes.S, F)) if EDGES else 0
    if F.bias and not EDGES:
        j = tl.minimum(j, sizes.S - 1)
    q_tile, do_tile = offsets(q_stride, F.BLOCK_M, F.BLOCK_D), offsets(do_stride, F.BLOCK_M, F.BLOCK_D_V)
    path = walk(blocks, F.BLOCK_M, EDGES)
    for step in range(path[1]):
        i0 = step_to(path, step, F.BLOCK_M, EDGES)
        i = i0 + tl.arange(0, F.BLOCK_M)
        q = load_tile(q_head + i0.to(tl.int64) * q_stride.t + q_tile, i, sizes.T, CHECK, F.D, F.BLOCK_D)
        # the weights again
        scores = product(k, tl.trans(q), tl.zeros([F.BLOCK_N, F.BLOCK_M], tl.float32), F)
        x, ratio = logits(scores, i[None, :], j[:, None], head, bias_stride, sizes, scalars, EDGES, F)
        weights = tl.exp2(x - tl.load(lse2 + i)[None, :])
        if EDGES and F.hides:
            of_query = as_row(marks(q_table, i, sizes.T, F))
            weights = tl.where(visible(i[None, :], j[:, None], of_query, of_key, head, sizes, F), weights, 0.0)
        # their gradient, through dropout, softmax and softcap
        d_o = load_tile(do_head + i0.to(tl.int64) * do_stride.t + do_tile, i, sizes.T, CHECK, F.D_V, F.BLOCK_D_V)
        d_weights = product(v, tl.trans(d_o), tl.zeros([F.BLOCK_N, F.BLOCK_M], tl.float32), F)
        dropped_weights = weights
        if F.dropout:
            mask = keep(i[None, :], j[:, None], head, scalars)
            dropped_weights = tl.where(mask, weights * scalars.keep_scale, 0.0)
            d_weights = tl.where(mask, d_weights * scalars.keep_scale, 0.0)
        dv = product(dropped_weights, d_o, dv, F)
        d_scores = weights * (d_weights - tl.load(delta + i)[None, :])
        if F.softcap:
            d_scores = d_scores * (1.0 - ratio * ratio)
        dk = product(d_scores, q, dk, F)
    return dk, dv


@triton.jit
def query_gradient(
    Q, K, V, D_OUT, LSE2, DELTA, D_Q,
    extras, q_stride, k_stride, v_stride, do_stride, dq_stride, bias_stride, sizes, scalars,
    F: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries; walks over keys as the forward kernel does."""
    # which queries, with their output gradient, log-sum-exp and delta
    n_blocks = tl.cdiv(sizes.T, F.BLOCK_M)
    bh = tl.program_id(0) // n_blocks
    b, h = bh // sizes.H, bh % sizes.H
    i0 = (n_blocks - 1 - tl.program_id(0) % n_blocks) * F.BLOCK_M
    i = i0 + tl.arange(0, F.BLOCK_M)
    q_table = table_of(extras.queries, b, sizes.query_table, F)
    k_table = table_of(extras.keys, b, sizes.key_table, F)
    head = head_inputs(extras, b, h, bias_stride, sizes, F)
    q_tile = base(Q, b, h, i0, q_stride) + offsets(q_stride, F.BLOCK_M, F.BLOCK_D)
    do_tile = base(D_OUT, b, h, i0, do_stride) + offsets(do_stride, F.BLOCK_M, F.BLOCK_D_V)
    q = load_tile(q_tile, i, sizes.T, not F.even_m, F.D, F.BLOCK_D)
    d_o = load_tile(do_tile, i, sizes.T, not F.even_m, F.D_V, F.BLOCK_D_V)
    row = bh.to(tl.int64) * sizes.padded + i
    lse2, delta = tl.load(LSE2 + row), tl.load(DELTA + row)
    # keys that all see, then full blocks without a mask, then edges with one
    k_head, v_head = base(K, b, h // sizes.group, b * 0, k_stride), base(V, b, h // sizes.group, b * 0, v_stride)
    blocks = key_blocks(i0, q_table, sizes, F)
    dq = tl.zeros([F.BLOCK_M, F.BLOCK_D], tl.float32)
    if F.global_prefix:
        first, blocks = split_global_prefix(blocks, head[5], F.BLOCK_N)
        dq = _queries_of(
            dq, q, d_o, lse2, delta, k_head, v_head, i, q_table, k_table, head, first, k_stride, v_stride, bias_stride,
            sizes, scalars, True, F,
        )  # fmt: skip
    if F.order == 0:
        dq = _queries_of(
            dq, q, d_o, lse2, delta, k_head, v_head, i, q_table, k_table, head, blocks, k_stride, v_stride, bias_stride,
            sizes, scalars, False, F,
        )  # fmt: skip
    if F.hides or not F.even_n:
        dq = _queries_of(
            dq, q, d_o, lse2, delta, k_head, v_head, i, q_table, k_table, head, blocks, k_stride, v_stride, bias_stride,
            sizes, scalars, True, F,
        )  # fmt: skip
    dq_tile = base(D_Q, b, h, i0, dq_stride) + offsets(dq_stride, F.BLOCK_M, F.BLOCK_D)
    store_tile(dq_tile, dq * scalars.scale, i, sizes.T, F.D, F.BLOCK_D)


@triton.jit
def _queries_of(
    dq, q, d_o, lse2, delta, k_head, v_head, i, q_table, k_table, head, blocks, k_stride, v_stride, bias_stride, sizes,
    scalars, EDGES: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """dQ plus the share of the full blocks of keys, or of the edges."""
    CHECK: tl.constexpr = EDGES and not F.even_n
    of_query = as_column(marks(q_table, i, sizes.T, F)) if EDGES else 0
    if F.bias and not EDGES:
        i = tl.minimum(i, sizes.T - 1)
    k_tile, v_tile = offsets(k_stride, F.BLOCK_N, F.BLOCK_D), offsets(v_stride, F.BLOCK_N, F.BLOCK_D_V)
    path = walk(blocks, F.BLOCK_N, EDGES)
    for step in range(path[1]):
        j0 = step_to(path, step, F.BLOCK_N, EDGES)
        j = j0 + tl.arange(0, F.BLOCK_N)
        k = load_tile(k_head + j0.to(tl.int64) * k_stride.t + k_tile, j, sizes.S, CHECK, F.D, F.BLOCK_D)
        v = load_tile(v_head + j0.to(tl.int64) * v_stride.t + v_tile, j, sizes.S, CHECK, F.D_V, F.BLOCK_D_V)
        # the gradient of the scores, and through the cap to the products
        d_scores, ratio = score_gradient(
            q, d_o, lse2, delta, k, v, i, j, of_query, k_table, head, bias_stride, sizes, scalars, EDGES, F
        )
        if F.softcap:
            d_scores = d_scores * (1.0 - ratio * ratio)
        dq = product(d_scores, k, dq, F)
    return dq


@triton.jit
def score_gradient(
    q, d_o, lse2, delta, k, v, i, j, of_query, k_table, head, bias_stride, sizes, scalars, EDGES: tl.constexpr,
    F: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores (after cap and bias) at one tile of queries by keys, and the tanh of the softcap."""
    scores = product(q, tl.trans(k), tl.zeros([F.BLOCK_M, F.BLOCK_N], tl.float32), F)
    x, ratio = logits(scores, i[:, None], j[None, :], head, bias_stride, sizes, scalars, EDGES, F)
    weights = tl.exp2(x - lse2[:, None])
    if EDGES:
        of_key = as_row(marks(k_table, j, sizes.S, F))
        weights = tl.where(visible(i[:, None], j[None, :], of_query, of_key, head, sizes, F), weights, 0.0)
    d_weights = product(d_o, tl.trans(v), tl.zeros([F.BLOCK_M, F.BLOCK_N], tl.float32), F)
    if F.dropout:
        mask = keep(i[:, None], j[None, :], head, scalars)
        d_weights = tl.where(mask, d_weights * scalars.keep_scale, 0.0)
    return weights * (d_weights - delta[:, None]), ratio


@triton.jit
def bias_gradient(
    Q, K, V, D_OUT, LSE2, DELTA, D_BIAS,
    extras, q_stride, k_stride, v_stride, do_stride, bias_stride, sizes, scalars, n_bias_heads, n_sequences, n_heads,
    F: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of the bias (B or 1, H or 1, T, S), summed in order over the sequences and heads that share it.

    n_sequences, n_heads: how many share one entry. A bias for every head and sequence is one term each.
    """
    # the tile
    n_i, n_j = tl.cdiv(sizes.T, F.BLOCK_M), tl.cdiv(sizes.S, F.BLOCK_N)
    tile, out = tl.program_id(0) % (n_i * n_j), tl.program_id(0) // (n_i * n_j)
    i0, j0 = tile // n_j * F.BLOCK_M, tile % n_j * F.BLOCK_N
    i, j = i0 + tl.arange(0, F.BLOCK_M), j0 + tl.arange(0, F.BLOCK_N)
    total = tl.zeros([F.BLOCK_M, F.BLOCK_N], tl.float32)
    # a loop in a fixed order, so that the sum is the same in every run
    for step in range(n_sequences * n_heads):
        b, h = out // n_bias_heads + step // n_heads, out % n_bias_heads + step % n_heads
        q_table = table_of(extras.queries, b, sizes.query_table, F)
        k_table = table_of(extras.keys, b, sizes.key_table, F)
        head = head_inputs(extras, b, h, bias_stride, sizes, F)
        q_tile = base(Q, b, h, i0, q_stride) + offsets(q_stride, F.BLOCK_M, F.BLOCK_D)
        do_tile = base(D_OUT, b, h, i0, do_stride) + offsets(do_stride, F.BLOCK_M, F.BLOCK_D_V)
        k_tile = base(K, b, h // sizes.group, j0, k_stride) + offsets(k_stride, F.BLOCK_N, F.BLOCK_D)
        v_tile = base(V, b, h // sizes.group, j0, v_stride) + offsets(v_stride, F.BLOCK_N, F.BLOCK_D_V)
        q = load_tile(q_tile, i, sizes.T, True, F.D, F.BLOCK_D)
        d_o = load_tile(do_tile, i, sizes.T, True, F.D_V, F.BLOCK_D_V)
        k = load_tile(k_tile, j, sizes.S, True, F.D, F.BLOCK_D)
        v = load_tile(v_tile, j, sizes.S, True, F.D_V, F.BLOCK_D_V)
        row = (b * sizes.H + h).to(tl.int64) * sizes.padded + i
        of_query = as_column(marks(q_table, i, sizes.T, F))
        d_scores, _ = score_gradient(
            q, d_o, tl.load(LSE2 + row), tl.load(DELTA + row), k, v, i, j, of_query, k_table, head, bias_stride, sizes,
            scalars, True, F,
        )  # fmt: skip
        total += d_scores
    d_bias = D_BIAS + out.to(tl.int64) * sizes.T * sizes.S + i.to(tl.int64)[:, None] * sizes.S + j[None, :]
    tl.store(d_bias, total, mask=(i < sizes.T)[:, None] & (j < sizes.S)[None, :])
