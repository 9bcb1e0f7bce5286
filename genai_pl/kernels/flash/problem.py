"""Problem: one call of attention as the kernels see it, with features, sizes, strides and tensors for results."""

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from genai_pl.kernels.flash.common import BiasStrides, Extras, Features, Scalars, Sizes
from genai_pl.kernels.flash.config import Blocks, launch_config, precision

CARRIERS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOG2E = 1.4426950408889634  # scores live in the log2 domain
ROW_BUFFER = 128  # no block of queries is longer


class Case(NamedTuple):
    """The numbers of one call, in the order of the operator's schema; a window or softcap of 0 is none.

    prefix, segments, global_prefix: whether the mask has them. order: 0 none, 1 keys of the query's rank or lower, 2 lower.
    """

    causal: bool
    window: int
    prefix: bool
    segments: bool
    order: int
    scale: float
    softcap: float
    dropout_p: float
    global_prefix: bool


class Problem:
    """The arguments that all kernels of one call share.

    q (B, H, T, D), k (B, K, S, D), v (B, K, S, D_V). extras: optional tensors. arch: a key of `config.TABLES`, "hip" or
    "interpreter", whose operands are float32 that hold rounded numbers (`common.product`).
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, extras: Extras, case: Case, arch: str) -> None:
        (self.B, self.H, self.T, D), (_, self.K, self.S, D_V) = q.shape, v.shape
        self.dtype, self.device, self.arch, self.case = q.dtype, q.device, arch, case
        self.carrier = CARRIERS.get(q.dtype, "") if arch == "interpreter" else ""
        # tensors as the kernels read them
        self.q, self.k, self.v = (self.operand(x) for x in (q, k, v))
        self.bias_shape = () if extras.bias is None else (1,) * (4 - extras.bias.dim()) + extras.bias.shape
        self.extras, self.bias_stride = self._prepare(extras)
        # what they are compiled for
        self.scalars = _scalars(case)
        self.features = Features(
            D=D,
            D_V=D_V,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            BLOCK_D_V=max(16, triton.next_power_of_2(D_V)),
            causal=case.causal,
            window=case.window > 0,
            prefix=case.prefix,
            segments=case.segments,
            global_prefix=case.global_prefix,
            order=case.order,
            bias=extras.bias is not None,
            alibi=extras.alibi is not None,
            sinks=extras.sinks is not None,
            softcap=case.softcap > 0,
            dropout=case.dropout_p > 0,
            precision=precision(self.dtype, arch),
            carrier=self.carrier,
        )

    @property
    def featured(self) -> bool:
        """True if an inner loop holds more than products, a causal edge and a softmax: it gets smaller blocks."""
        f = self.features
        return f.tables or f.order > 0 or f.dropout or not f.plain

    def _prepare(self, extras: Extras) -> tuple[Extras, BiasStrides]:
        """The extras as the kernels read them: slopes and sinks in float32, the bias as (B, H, T, S), with its strides."""
        stride = BiasStrides(0, 0, 0, 0)
        if extras.alibi is not None:
            extras = extras._replace(alibi=extras.alibi.float().contiguous())
        if extras.sinks is not None:
            extras = extras._replace(sinks=extras.sinks.float().contiguous())
        if extras.bias is not None:
            bias = extras.bias.expand(self.B, self.H, self.T, self.S)
            bias = bias.float() if self.carrier else bias
            extras, stride = extras._replace(bias=bias), BiasStrides(*bias.stride())
        return extras, stride

    def operand(self, x: Tensor) -> Tensor:
        """A tensor as the kernels read it: contiguous in its last dimension, and float32 for the interpreter."""
        x = x.float() if self.carrier else x
        return x if x.stride(-1) == 1 else x.contiguous()

    def sizes(self) -> Sizes:
        """Sizes and table strides; rows of the backward pass's buffers are padded so that its blocks need no check."""
        padded = triton.cdiv(self.T, ROW_BUFFER) * ROW_BUFFER
        tables = (_batch_stride(x) for x in (self.extras.queries, self.extras.keys))
        return Sizes(self.T, self.S, self.H, self.H // self.K, self.T, padded, self.case.window, *tables)

    def blocks(self, kind: str, featured: bool | None = None) -> Blocks:
        """Block sizes of one kernel: forward, key_value, query, bias or split."""
        f = self.features
        return launch_config(
            kind, max(f.BLOCK_D, f.BLOCK_D_V), self.dtype, self.arch, self.featured if featured is None else featured
        )

    def compiled_for(self, blocks: Blocks) -> Features:
        """The features with block sizes, and whether they divide T and S, so that loads need no check."""
        even_m, even_n = self.T % blocks.BLOCK_M == 0, self.S % blocks.BLOCK_N == 0
        return replace(self.features, BLOCK_M=blocks.BLOCK_M, BLOCK_N=blocks.BLOCK_N, even_m=even_m, even_n=even_n)

    def output(self, heads: int, length: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """An empty (B, heads, length, width) whose heads lie side by side, as the next linear layer reads them."""
        shape = (self.B, length, heads, width)
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.device).transpose(1, 2)

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized float32 tensor."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def _batch_stride(table: Tensor | None) -> int:
    """Elements from one row's table to the next, 0 if all rows share it."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def _scalars(case: Case) -> Scalars:
    """The factors of the inner loop, multiplied out."""
    cap = case.softcap or 1.0
    keep_scale = 1.0 / (1.0 - case.dropout_p) if case.dropout_p < 1.0 else 0.0
    scale = case.scale * LOG2E
    return Scalars(case.scale, scale, 2.0 * scale / cap, cap * LOG2E, case.dropout_p, keep_scale)
