"""Packed products: x W^T in float32 with W in 16, 8 or 4 bits, for a decoding step, which is as fast as it reads weights.

Several kernels can do it, our own in C (`row_products.py`) and those of torch, and which is fast depends on the processor
and the number of rows: bfloat16 has instructions of its own on one, is emulated on another. So a product is a pair of
functions, `pack` for the weight and `multiply`, and `fastest_product` runs those of a dtype on a model's own weights for
some milliseconds. A kernel that this torch or this machine lacks drops out there.

8-bit weights are multiplied in integers, exactly: an activation is written as high + low / 254, two integers of 8 bits
with one scale for each row, so it keeps 15 bits, and the weights are read once for both (`_split_product`).
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from genai_pl.kernels.int4 import GROUP, codes_of, ends_of, from_int4, to_int4
from genai_pl.kernels.int8 import from_int8, to_int8
from genai_pl.kernels.row_products import CACHED, FLOATS, multiply_rows, pack_rows

FEW = 8  # rows up to which torch's kernel for bf16 rows times int8 weights is used, where FBGEMM is missing
MULTIPLE = 16  # output channels of torch's kernel for 4-bit weights
PASSES = 3  # timed passes of a probe; the fastest counts, since other work only ever adds time
CLEARLY = 0.9  # of the time of an earlier candidate: a busy machine should decide as an idle one
TINY = torch.tensor(torch.finfo(torch.float32).tiny, **FLOATS)
LACKS = (RuntimeError, AttributeError, NotImplementedError)  # what a kernel raises that is not there


class Product(NamedTuple):
    """One way to compute x W^T: `pack` takes W (out, in), `multiply` x (..., in) and the packed W, result (..., out)."""

    name: str
    pack: Callable[[Tensor], object]
    multiply: Callable[[Tensor, object], Tensor]


def fastest_product(candidates: Sequence[Product], weights: Sequence[Tensor], *, rows: int) -> Product:
    """The product that takes the least time for `rows` rows with each of the weights (out, in) once.

    candidates: those of a dtype (`products_of`), of which the last runs everywhere; one replaces an earlier one only if it is
    clearly faster. Weights should be as many as do not fit into a cache, if the model does not.
    """
    best, least = candidates[-1], float("inf")
    with torch.inference_mode():
        inputs = [torch.randn(rows, weight.shape[1], **FLOATS) for weight in weights]
        for product in candidates:
            try:
                packed = [product.pack(weight) for weight in weights]
                seconds = _seconds(product, inputs, packed)
            except LACKS:
                continue
            if seconds < CLEARLY * least:
                best, least = product, seconds
    return best


def _seconds(product: Product, inputs: Sequence[Tensor], packed: Sequence[object]) -> float:
    """Seconds of the fastest of a few passes over all weights, after one that is not timed."""
    best = float("inf")
    for n in range(1 + PASSES):
        start = time.perf_counter()
        for x, weight in zip(inputs, packed, strict=True):
            product.multiply(x, weight)
        best = best if n == 0 else min(best, time.perf_counter() - start)
    return best


def products_of(dtype: torch.dtype) -> list[Product]:
    """The products for weights of a dtype that this processor may have; none for other dtypes than of 32, 16, 8 and 4 bits."""
    if dtype is torch.float32:
        return [_compiled(dtype), *LAYOUTS]
    if dtype is torch.int8:
        exact = next((limb for limb in (127, 63) if _is_exact(limb)), None)
        if exact is not None:
            return [_compiled(dtype), _split(exact)]
        return [
            _compiled(dtype),
            Product("int8 by torch", _pack_codes, _multiply_codes),
            Product("int8, dequantized", to_int8, lambda x, packed: F.linear(x, from_int8(*packed, packed[0].shape))),
        ]
    if dtype is torch.int4:
        return [
            _compiled(dtype),
            Product("int4 by torch", _pack_int4, _multiply_int4),
            Product("int4, dequantized", lambda weight: (to_int4(weight), weight.shape[1]), _dequantize_and_multiply),
        ]
    if dtype not in (torch.bfloat16, torch.float16):
        return []
    half = [
        Product("float16 by FBGEMM", _pack_half, lambda x, weight: torch.ops.quantized.linear_dynamic_fp16(x, weight))
    ]
    if dtype is torch.bfloat16:
        half = [
            _compiled(dtype),
            *half,
            BF16,
            Product("bfloat16", torch.Tensor.bfloat16, lambda x, weight: F.linear(x.bfloat16(), weight).float()),
        ]
    return [*half, Product("float32", by_columns, F.linear)]


def _compiled(dtype: torch.dtype) -> Product:
    return Product(f"{str(dtype).removeprefix('torch.')} compiled", partial(pack_rows, dtype=dtype), multiply_rows)


def by_columns(weight: Tensor) -> Tensor:
    """The matrix in float32 with the entries of each column next to each other."""
    return weight.float().t().contiguous().t()


# products that leave a float32 weight what it is, in one order or the other
LAYOUTS = (
    Product("float32 by columns", by_columns, F.linear),
    Product("float32", torch.Tensor.contiguous, F.linear),
)


# 16 bits


def _pack_half(weight: Tensor) -> object:
    """FBGEMM's float16 weights, which it multiplies in float32.

    A bfloat16 keeps all of its 8 bits there, unless it is below 2^-17 (an error of 2^-25) or above what float16 has.
    """
    if weight.abs().max() > torch.finfo(torch.float16).max:
        raise NotImplementedError("a weight exceeds the range of float16")
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)


def _pack_onednn(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16().contiguous())


def _multiply_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, None, "none", [], "").float()


BF16 = Product("bfloat16 by oneDNN", _pack_onednn, _multiply_onednn)  # rounds as autocast does


# 8 bits


def _split(limb: int) -> Product:
    mix = torch.tensor([[0.0, 1.0], [2.0 * limb, -2.0 * limb]], **FLOATS).T[..., None, None].unbind()
    return Product("int8 by FBGEMM", _pack_int8, partial(_split_product, limb=limb, mix=mix))


def _pack_int8(weight: Tensor) -> object:
    """FBGEMM's 8-bit weights with a scale for each output channel."""
    codes, scales = to_int8(weight)
    zeros = torch.zeros(len(codes), dtype=torch.long, device="cpu")
    with _fbgemm(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch will move quantized tensors elsewhere
        quantized = torch._make_per_channel_quantized_tensor(codes.contiguous(), scales.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


@contextmanager
def _fbgemm() -> Iterator[None]:
    """Context manager: weights are packed for FBGEMM inside, whatever engine the process has chosen."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _split_product(x: Tensor, packed: object, *, limb: int, mix: tuple[Tensor, Tensor]) -> Tensor:
    """x W^T of 8-bit weights, by integers of magnitude up to `limb` for x.

    A row is scale * (high + low / (2 limb)): high is rounded, low is what rounding has left, in steps of 1 / (2 limb).
    mix: factors of x / scale and of high, each (2, 1, 1), that give high and low; few operations matter for few rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    # one scale a row; a row of zeros keeps a scale above 0, one with NaN or infinity gives NaN
    if len(rows) == 1:  # one operation instead of two, which is slower for more rows
        largest = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True)
    else:
        largest = rows.abs().amax(1, keepdim=True)
    scale = torch.add(TINY, largest, alpha=1 / limb)  # (N, 1)
    scaled = rows / scale
    both = torch.addcmul(scaled * mix[0], scaled.round(), mix[1])  # (2, N, in)
    # FBGEMM rounds its input / 1.0 to integers, offset to be unsigned
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(both, 1.0, limb + 1, packed)
    return torch.add(y[0], y[1], alpha=1 / (2 * limb)).mul_(scale).view(*x.shape[:-1], -1)


def _is_exact(limb: int) -> bool:
    """True if FBGEMM is there and its sums are exact for integers up to `limb`.

    Processors without VNNI add two products in 16 bits, which saturate: there activations may have 7 bits only.
    """
    try:
        weight = torch.ones(16, 64, **FLOATS)
        weight[::2] = -1.0
        x = torch.full((2, 64), float(limb), **FLOATS)
        x[1] = -limb
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, limb + 1, _pack_int8(weight))
    except LACKS:
        return False
    return torch.allclose(y, x @ weight.t(), rtol=1e-5, atol=0)


def _pack_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = to_int8(weight)
    return codes.contiguous(), scales


def _multiply_codes(x: Tensor, packed: tuple[Tensor, Tensor]) -> Tensor:
    """x W^T by torch's kernel for few rows, whose activations are rounded to bfloat16; many rows dequantize W."""
    codes, scales = packed
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        return F.linear(x, from_int8(codes, scales, codes.shape))
    y = torch._weight_int8pack_mm(rows.bfloat16(), codes, torch.ones_like(scales, dtype=torch.bfloat16))
    return (y.float() * scales).view(*x.shape[:-1], -1)


# 4 bits


class Int4Weight(NamedTuple):
    """torch's packed codes, with scales and zeros (groups, out, 2), out filled up to a multiple of 16; the weight's own sizes."""

    codes: Tensor
    ends: Tensor
    width: int
    out: int


def _pack_int4(weight: Tensor) -> Int4Weight:
    """torch's 4-bit weights, whose value is (code - 8) * scale + zero."""
    out, width = weight.shape
    blocks = F.pad(to_int4(weight), (0, 0, 0, -out % MULTIPLE))
    scale, low = ends_of(blocks)
    codes = torch._convert_weight_to_int4pack_for_cpu(codes_of(blocks).int().contiguous(), 2)
    return Int4Weight(codes, torch.stack([scale, low + 8 * scale], dim=-1).transpose(0, 1).contiguous(), width, out)


def _multiply_int4(x: Tensor, packed: Int4Weight) -> Tensor:
    codes, ends, width, out = packed
    rows = F.pad(x.reshape(-1, width), (0, -width % GROUP)).contiguous()
    y = torch._weight_int4pack_mm_for_cpu(rows, codes, GROUP, ends)
    return y[:, :out].reshape(*x.shape[:-1], out)


def _dequantize_and_multiply(x: Tensor, packed: tuple[Tensor, int]) -> Tensor:
    """x W^T with some output channels at a time in float32."""
    blocks, width = packed
    parts = blocks.split(max(1, CACHED // width))
    return torch.cat([F.linear(x, from_int4(part, width)) for part in parts], dim=-1)
