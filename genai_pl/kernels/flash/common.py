"""Device functions and argument types that all flash attention kernels share: loads, products, visibility, scores, dropout.

A query sees keys in one interval almost always, so a block of keys is outside (skipped), full (no mask work) or an edge,
where every pair is compared by the rules of `AttentionMask`. Scores live in the log2 domain, where exp2 is one instruction.

Arguments travel in NamedTuples, which Triton takes apart: sizes and strides are integers that change from call to call, and
`Features` is a constexpr, so that code for what a call does not use is not compiled.
"""

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from genai_pl.kernels.flash import mask_tables as flash_tables

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SEGMENT, RANK = tl.constexpr(flash_tables.SEGMENT), tl.constexpr(flash_tables.RANK)
PREFIX, GLOBAL_PREFIX = tl.constexpr(flash_tables.PREFIX), tl.constexpr(flash_tables.GLOBAL_PREFIX)
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass BigCrush (Salmon et al. 2011, table 2)


@dataclass(frozen=True)
class Features:
    """The compile-time argument of a kernel: one kernel is compiled for each value.

    D, D_V              dimensions of queries and keys, and of values; BLOCK_D, BLOCK_D_V: the powers of two that hold them
    causal ... dropout  the rules and options of the call
    packed              split forward only: rows are all (query head, query) pairs of one key head
    precision           of products of float32: ieee or tf32
    carrier             interpreter only: the low precision whose numbers float32 operands hold
    BLOCK_M, BLOCK_N    queries and keys per block
    even_m, even_n      BLOCK_M divides T, BLOCK_N divides S: loads need no check
    """

    D: int
    D_V: int
    BLOCK_D: int
    BLOCK_D_V: int
    causal: bool = False
    window: bool = False
    prefix: bool = False
    segments: bool = False
    global_prefix: bool = False
    order: int = 0  # 1: keys of the query's rank or lower, 2: lower only
    bias: bool = False
    alibi: bool = False
    sinks: bool = False
    softcap: bool = False
    dropout: bool = False
    packed: bool = False
    precision: str = "ieee"
    carrier: str = ""
    BLOCK_M: int = 0
    BLOCK_N: int = 0
    even_m: bool = False
    even_n: bool = False

    @property
    def tables(self) -> bool:
        """True if the blocks to visit are read from tables instead of computed."""
        return self.prefix or self.segments or self.global_prefix

    @property
    def plain(self) -> bool:
        """True if a logit is nothing but a scaled product."""
        return not (self.softcap or self.bias or self.alibi)

    @property
    def hides(self) -> bool:
        """True if any rule may hide a key, so that there are edges."""
        return self.causal or self.window or self.tables or self.order > 0


class Sizes(NamedTuple):
    """Integers that change from call to call.

    T, S, H                 queries, keys, query heads (split and packed: key heads)
    group                   query heads per key head
    rows                    rows of a program's head: T, or (query head, query) pairs if packed
    padded                  rows of the backward pass's buffers
    window                  in positions, 0 without one
    query_table, key_table  elements from one batch row's table to the next
    """

    T: int
    S: int
    H: int
    group: int
    rows: int
    padded: int
    window: int
    query_table: int
    key_table: int


class Scalars(NamedTuple):
    """Factors of the inner loop, multiplied out before the launch."""

    scale: float
    scale_log2: float  # scores to log2 units
    softcap_in: float  # scores to the argument of exp(2 x), in log2 units
    softcap_out: float  # tanh to log2 units
    dropout_p: float
    keep_scale: float


class Extras(NamedTuple):
    """Optional tensors.

    bias (B or 1, H or 1, T, S); alibi (H,) slopes; queries and keys: the mask's tables (`mask_tables.py`); seed (1,) of
    dropout, a tensor so that no call waits for the device; sinks (H,) scores.
    """

    bias: Tensor | None = None
    alibi: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    seed: Tensor | None = None
    sinks: Tensor | None = None


class Strides(NamedTuple):
    """Elements from one batch row, head and position to the next; the last dimension is contiguous."""

    b: int
    h: int
    t: int


class BiasStrides(NamedTuple):
    """Elements from one entry of the bias to the next in each of its four dimensions, 0 where it is expanded."""

    b: int
    h: int
    t: int
    s: int


@triton.jit
def base(pointer, b, h, t, stride):
    """The address of position t of a head; in 64 bits, as a batch may pass 2^31 elements."""
    return pointer + b.to(tl.int64) * stride.b + h.to(tl.int64) * stride.h + t.to(tl.int64) * stride.t


@triton.jit
def offsets(stride, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of a tile of LENGTH positions by WIDTH channels from its first element."""
    return tl.arange(0, LENGTH)[:, None] * stride.t + tl.arange(0, WIDTH)[None, :]


@triton.jit
def load_tile(pointers, t, end, CHECK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile whose rows are positions t, with zeros from position `end` (if CHECK) and from channel D on."""
    if D == BLOCK_D:
        if CHECK:
            return tl.load(pointers, mask=(t < end)[:, None], other=0.0)
        return tl.load(pointers)
    inside = (tl.arange(0, BLOCK_D) < D)[None, :]
    if CHECK:
        inside = inside & (t < end)[:, None]
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_tile(pointers, values, t, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a tile up to position `end` and channel D, in the dtype of its destination."""
    inside = (t < end)[:, None]
    if D != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, acc, F: tl.constexpr):
    """acc + a b, a rounded to the precision of b.

    The interpreter multiplies the bit patterns of bfloat16 and truncates instead of rounding. There, operands are float32
    holding values rounded to nearest even: products of two such numbers are exact, as in a tensor core.
    """
    if F.carrier == "bf16":
        bits = a.to(tl.uint32, bitcast=True)
        a = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif F.carrier == "fp16":
        a = a.to(tl.float16).to(tl.float32)
    return tl.dot(a.to(b.dtype), b, acc, input_precision=F.precision)


@triton.jit
def head_inputs(extras, b, h, bias_stride, sizes, F: tl.constexpr):
    """(bias, slope, seed, row of the dropout counter, prefix, global_prefix) of one head; 0 where the case has none."""
    # placeholders for what the call does not have: the branches are decided when the kernel is compiled
    bias = 0
    slope = 0.0
    seed = 0
    prefix = 0
    global_prefix = 0
    if F.bias:
        bias = extras.bias + b.to(tl.int64) * bias_stride.b + h.to(tl.int64) * bias_stride.h
    if F.alibi:
        slope = tl.load(extras.alibi + h) * LOG2E
    if F.dropout:
        seed = tl.load(extras.seed)
    if F.prefix:
        prefix = tl.load(extras.queries + b.to(tl.int64) * sizes.query_table + PREFIX * sizes.T)
    if F.global_prefix:
        global_prefix = tl.load(extras.queries + b.to(tl.int64) * sizes.query_table + GLOBAL_PREFIX * sizes.T)
    return bias, slope, seed, b * sizes.H + h, prefix, global_prefix


@triton.jit
def table_of(table, b, stride, F: tl.constexpr):
    """The table of one batch row, or 0 where the mask needs none."""
    return table + b.to(tl.int64) * stride if F.tables or F.order > 0 else 0


@triton.jit
def marks(table, index, length, F: tl.constexpr):
    """(segment, rank) of each index from a table, segment 0 past the end; the index itself where the mask has none."""
    segment = index
    rank = index
    if F.segments:
        segment = tl.load(table + SEGMENT * length + index, mask=index < length, other=0)
    if F.order > 0:
        rank = tl.load(table + RANK * length + index, mask=index < length, other=0)
    return segment, rank


@triton.jit
def as_column(pair):
    """Marks of queries, to be compared with those of keys in a row."""
    return pair[0][:, None], pair[1][:, None]


@triton.jit
def as_row(pair):
    """Marks of keys, to be compared with those of queries in a column."""
    return pair[0][None, :], pair[1][None, :]


@triton.jit
def visible(i, j, of_query, of_key, head, sizes, F: tl.constexpr):
    """`AttentionMask.dense` at queries i and keys j, which broadcast; rows past the last query are arbitrary."""
    position = i + (sizes.S - sizes.T)
    ok = j <= position if F.causal else j < sizes.S
    if F.window:
        ok = ok & (tl.abs(position - j) < sizes.window)
    if F.prefix:
        ok = ok | (j < head[4])
    if F.segments:
        ok = ok & (of_query[0] == of_key[0]) & (of_key[0] != 0)
    if F.global_prefix:
        ok = ok | ((j < head[5]) & (j <= position if F.causal else j < sizes.S))
    if F.order > 0:
        ok = ok & (of_key[1] <= of_query[1] if F.order == 1 else of_key[1] < of_query[1])
    return ok


@triton.jit
def logits(scores, i, j, head, bias_stride, sizes, scalars, CHECK: tl.constexpr, F: tl.constexpr):
    """Scores in log2 units, with cap, bias and slope, from products at queries i and keys j, which broadcast; and the cap's tanh.

    CHECK: whether i and j may be past the end, where the bias must not be read. The tanh gives the gradient its slope.
    """
    ratio = scores
    if F.softcap:
        ratio = 1.0 - 2.0 / (tl.exp2(scores * scalars.softcap_in) + 1.0)
        out = ratio * scalars.softcap_out
    else:
        out = scores * scalars.scale_log2
    if F.bias:
        pointers = head[0] + i.to(tl.int64) * bias_stride.t + j.to(tl.int64) * bias_stride.s
        bias = tl.load(pointers, mask=(i < sizes.T) & (j < sizes.S), other=0.0) if CHECK else tl.load(pointers)
        out += bias.to(tl.float32) * LOG2E
    if F.alibi:
        out -= tl.abs(i + (sizes.S - sizes.T) - j).to(tl.float32) * head[1]
    return out, ratio


@triton.jit
def keep(i, j, head, scalars):
    """True for weights that dropout keeps, at queries i and keys j: Philox of (key, query, head) (Salmon et al. 2011).

    A counter, not a stream: forward and backward get the same bits, whatever their blocks and order.
    """
    key, query = tl.broadcast(j.to(tl.uint32), i.to(tl.uint32))
    zero = tl.zeros_like(key)
    bits, _, _, _ = tl.philox(head[2], key, query, zero + head[3].to(tl.uint32), zero, PHILOX_ROUNDS)
    return (bits >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0) >= scalars.dropout_p
