"""Launches: which flash attention kernels run for a problem, with which grids, and the tensors that they fill.

Launches are data (`Launch`), made before anything runs: tests and benchmarks compile them for GPUs that are not there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from genai_pl.kernels.flash.backward import bias_gradient, key_value_gradients, query_gradient, row_sums
from genai_pl.kernels.flash.common import Extras, Sizes, Strides
from genai_pl.kernels.flash.config import Blocks, architecture, n_processors
from genai_pl.kernels.flash.forward import combine, forward
from genai_pl.kernels.flash.problem import Case, Problem

SHORT = 16  # up to this many queries, keys are split among programs instead


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name in reports, the grid of programs, its arguments and the compiler's options."""

    name: str
    kernel: Callable
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]


def forward_launches(p: Problem) -> tuple[list[Launch], Tensor, Tensor]:
    """The kernels of the forward pass, and the output (B, H, T, D) and log-sum-exp (B, H, T) that they fill."""
    o, lse = p.output(p.H, p.T, p.features.D_V), p.empty(p.B, p.H, p.T)
    if p.T <= SHORT and p.T < p.S:
        return _split_launches(p, o, lse), o, lse
    blocks = p.blocks("forward")
    grid = (triton.cdiv(p.T, blocks.BLOCK_M) * p.B * p.H,)
    strides = (*_strides(p.q, p.k, p.v, o), p.bias_stride)
    args = (p.q, p.k, p.v, o, lse, p.extras, *strides, p.sizes(), p.scalars, 0, False, p.compiled_for(blocks))
    return [Launch("forward", forward, grid, args, blocks.options())], o, lse


def _split_launches(p: Problem, o: Tensor, lse: Tensor) -> list[Launch]:
    """Forward with split keys, for decoding: as many programs as fill the device share a row's keys, and `combine` adds up.

    The query heads of a key head are rows of one block, so that keys and values are read once for all of them.
    """
    f, q, sizes = p.features, p.q, p.sizes()
    packed = p.H > p.K and not (f.bias or f.alibi or f.dropout)  # those three differ by head
    if packed:
        sizes = sizes._replace(H=p.K, group=1, rows=p.H // p.K * p.T)
        q = q.reshape(p.B, p.K, sizes.rows, f.D)
    blocks = p.blocks("split")
    blocks = blocks._replace(BLOCK_M=min(64, max(16, triton.next_power_of_2(sizes.rows))))
    # splits: about two programs per multiprocessor, whole blocks each
    n_programs = triton.cdiv(sizes.rows, blocks.BLOCK_M) * p.B * sizes.H
    n_blocks = triton.cdiv(p.S, blocks.BLOCK_N)
    n_wanted = triton.cdiv(2 * n_processors(p.device), n_programs)
    split_size = triton.cdiv(n_blocks, min(n_blocks, n_wanted)) * blocks.BLOCK_N
    n_splits = triton.cdiv(p.S, split_size)
    parts, parts_lse = p.empty(n_splits * p.B, sizes.H, sizes.rows, f.D_V), p.empty(n_splits, p.B, p.H, p.T)
    # even blocks are not worth a second kernel here: S changes with every token
    compiled = replace(p.compiled_for(blocks), packed=packed, even_m=False, even_n=False)
    strides = (*_strides(q, p.k, p.v, parts), p.bias_stride)
    args = (q, p.k, p.v, parts, parts_lse, p.extras, *strides, sizes, p.scalars, split_size, True, compiled)
    joined = (parts, parts_lse, o, lse, p.extras, *_strides(o), p.sizes(), n_splits, p.H, compiled)
    return [
        Launch("split", forward, (n_programs, n_splits), args, blocks.options()),
        Launch("combine", combine, (p.B * p.H * p.T,), joined, Blocks(1, 1, 1, 1).options()),
    ]


class Gradients(NamedTuple):
    """The gradients that the kernels fill; dk and dv may have H heads, to be summed over those that share a key head.

    d_sinks: (B, H, blocks), to be summed over batch rows and blocks.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    d_bias: Tensor | None
    d_sinks: Tensor | None


def backward_launches(
    p: Problem, d_o: Tensor, d_lse: Tensor | None, o: Tensor, lse: Tensor, *, need_bias: bool
) -> tuple[list[Launch], Gradients]:
    """The kernels of the backward pass, in order, and the gradients that they fill.

    d_o (B, H, T, D_V) and d_lse (B, H, T) or None: gradients of output and log-sum-exp. need_bias: whether the bias gets one.
    """
    # row sums first: the others read them
    f, sizes, d_o, o = p.features, p.sizes(), p.operand(d_o), p.operand(o)
    lse2, delta = p.empty(p.B, p.H, sizes.padded), p.empty(p.B, p.H, sizes.padded)
    rows = replace(f, BLOCK_M=32)
    n_blocks = sizes.padded // rows.BLOCK_M
    grid = (n_blocks * p.B * p.H,)
    d_sinks = p.empty(p.B, p.H, n_blocks) if f.sinks else None
    # the gradient of a sum is one number, expanded: the kernel needs real strides
    d_lse = None if d_lse is None else d_lse.contiguous()
    args = (o, d_o, lse, d_lse, lse2, delta, d_sinks, p.extras, *_strides(o, d_o), sizes, d_lse is not None, rows)
    launches = [Launch("row_sums", row_sums, grid, args, Blocks(32, 1, 4, 1).options())]

    # keys and values, queries, bias
    inputs, strides = (p.q, p.k, p.v, d_o, lse2, delta), _strides(p.q, p.k, p.v, d_o)
    launch, dk, dv = _key_value_launch(p, sizes, inputs, strides)
    dq = p.output(p.H, p.T, f.D)
    blocks = p.blocks("query")
    args = (*inputs, dq, p.extras, *strides, *_strides(dq), p.bias_stride, sizes, p.scalars, p.compiled_for(blocks))
    grid = (triton.cdiv(p.T, blocks.BLOCK_M) * p.B * p.H,)
    launches += [launch, Launch("query", query_gradient, grid, args, blocks.options())]
    d_bias = None
    if need_bias:
        launch, d_bias = _bias_launch(p, sizes, inputs, strides)
        launches.append(launch)
    return launches, Gradients(dq, dk, dv, d_bias, d_sinks)


def _key_value_launch(p: Problem, sizes: Sizes, inputs: tuple, strides: tuple) -> tuple[Launch, Tensor, Tensor]:
    """The launch for dK and dV, (B, K, S, ...), or with all H heads where key heads alone are too few programs."""
    blocks = p.blocks("key_value", featured=p.featured or p.H > p.K)
    n_programs = triton.cdiv(p.S, blocks.BLOCK_N) * p.B * p.K
    # too few key heads to fill the device: a program per query head, summed afterwards in float32
    n_heads = p.H // p.K if n_programs >= n_processors(p.device) else 1
    dtype = torch.float32 if n_heads < p.H // p.K else None
    dk, dv = (p.output(p.H // n_heads, p.S, width, dtype) for width in (p.features.D, p.features.D_V))
    outputs = (*_strides(dk, dv), p.bias_stride)
    args = (*inputs, dk, dv, p.extras, *strides, *outputs, sizes, p.scalars, n_heads, p.compiled_for(blocks))
    grid = (triton.cdiv(p.S, blocks.BLOCK_N) * p.B * (p.H // n_heads),)
    return Launch("key_value", key_value_gradients, grid, args, blocks.options()), dk, dv


def _bias_launch(p: Problem, sizes: Sizes, inputs: tuple, strides: tuple) -> tuple[Launch, Tensor]:
    """The launch for the gradient of the bias, in float32 in the bias's own shape."""
    blocks = p.blocks("bias")
    n_b, n_h = p.bias_shape[:2]
    d_bias = p.empty(n_b, n_h, p.T, p.S)
    counts = (n_h, p.B // n_b, p.H // n_h)
    args = (*inputs, d_bias, p.extras, *strides, p.bias_stride, sizes, p.scalars, *counts, p.compiled_for(blocks))
    grid = (triton.cdiv(p.T, blocks.BLOCK_M) * triton.cdiv(p.S, blocks.BLOCK_N) * n_b * n_h,)
    return Launch("bias", bias_gradient, grid, args, blocks.options()), d_bias


def run_forward(q: Tensor, k: Tensor, v: Tensor, extras: Extras, case: Case) -> tuple[Tensor, Tensor]:
    """Run the forward pass: output (B, H, T, D_V) in the dtype of q, and log-sum-exp (B, H, T) in float32."""
    launches, o, lse = forward_launches(Problem(q, k, v, extras, case, architecture(q.device)))
    _run(launches, q)
    return o.to(q.dtype), lse


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, d_o: Tensor, d_lse: Tensor | None, extras: Extras, case: Case,
    *, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Run the backward pass: gradients of q, k, v, of the bias and of the sinks, in their dtypes and shapes."""
    p = Problem(q, k, v, extras, case, architecture(q.device))
    launches, (dq, dk, dv, d_bias, d_sinks) = backward_launches(p, d_o, d_lse, o, lse, need_bias=need_bias)
    _run(launches, q)
    if dk.shape[1] > p.K:
        dk, dv = (x.unflatten(1, (p.K, -1)).sum(2) for x in (dk, dv))
    if d_bias is not None:
        d_bias = d_bias.sum_to_size(extras.bias.shape).to(extras.bias.dtype)
    if d_sinks is not None:
        d_sinks = d_sinks.sum((0, 2)).to(extras.sinks.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_bias, d_sinks


def _run(launches: list[Launch], q: Tensor) -> None:
    """Launch in order, on the device of q."""
    with torch.cuda.device_of(q):  # Triton launches on the current device, which may be another
        for launch in launches:
            launch.kernel[launch.grid](*launch.args, **launch.options)


def _strides(*tensors: Tensor) -> tuple[Strides, ...]:
    """Strides of (B, H, T, D) tensors; the last is 1."""
    return tuple(Strides(*x.stride()[:3]) for x in tensors)
