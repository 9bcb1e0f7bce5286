"""Grouped products: rows that are sorted by group, each group multiplied by a matrix of its own, as one torch operator.

The experts of a mixture are such groups. How many rows a group has is known on the device only, so this is an operator of
its own: torch.compile, recomputation, fake tensors and FLOP counters see one call with known shapes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

ALIGNED = 16  # bytes that rows must be a multiple of for torch._grouped_mm


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x W_g^T for each row of x (N, in), in the group that the row lies in: (N, out); under autocast in its dtype.

    weight (E, out, in). ends (E,) int32: the row behind the last one of each group, ascending to N; a group may be empty.
    The gradient of the weight of an empty group is zero.

    >>> x, weight = torch.ones(3, 2), torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
    >>> grouped_linear(x, weight, torch.tensor([1, 3], dtype=torch.int32)).flatten().tolist()
    [2.0, 4.0, 4.0]
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    else:
        weight = weight.to(x.dtype)  # a frozen one may be held in 16 bits
    return torch.ops.genai_pl.grouped_linear(x, weight, ends)


def grouped_rows(values: Tensor, groups: Tensor) -> Tensor:
    """The row of a table (E, ...) for the group of each of N rows, (N, ...); groups (N,) are integers."""
    return F.embedding(groups, values)


def serves(x: Tensor, *sizes: int) -> bool:
    """True where torch._grouped_mm has a kernel: on a GPU, in bfloat16, for rows in sizes that are multiples of 16 bytes.

    Of divided experts a rank may get no row at all.
    """
    aligned = all(size * x.element_size() % ALIGNED == 0 for size in sizes)
    return x.device.type == "cuda" and x.dtype is torch.bfloat16 and aligned and x.shape[0] > 0


def by_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The forward product by one call of torch._grouped_mm."""
    return torch._grouped_mm(x, weight.mT, offs=ends)


def weight_gradient_by_groups(d_y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the weight by one call of torch._grouped_mm."""
    return torch._grouped_mm(d_y.mT, x, offs=ends)


def by_slices(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The forward product as one dense product for each group that has rows, written into one result."""
    y, start = x.new_empty(x.shape[0], weight.shape[1]), 0
    for matrix, end in zip(weight.unbind(), ends.tolist(), strict=True):
        if end > start:
            torch.mm(x[start:end], matrix.mT, out=y[start:end])
        start = end
    return y


def weight_gradient_by_slices(d_y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient of the weight, (E, out, in), group by group; zero for a group without rows."""
    d_weight, start = x.new_zeros(len(ends), d_y.shape[1], x.shape[1]), 0
    for matrix, end in zip(d_weight.unbind(), ends.tolist(), strict=True):
        if end > start:
            torch.mm(d_y[start:end].mT, x[start:end], out=matrix)
        start = end
    return d_weight


def _forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The operator's kernel."""
    product = by_groups if serves(x, *weight.shape[1:]) else by_slices
    return product(x, weight, ends)


def _weight_gradient(d_y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The kernel of the gradient of the weight."""
    product = weight_gradient_by_groups if serves(x, d_y.shape[1], x.shape[1]) else weight_gradient_by_slices
    return product(d_y, x, ends)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    """Keep the operands for the backward pass."""
    ctx.save_for_backward(*inputs)


def _gradients(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Gradients of rows and weight: a grouped product by the transposed matrices, and one over the rows of a group."""
    x, weight, ends = ctx.saved_tensors
    d_y, d_x, d_weight = d_y.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        d_x = torch.ops.genai_pl.grouped_linear(d_y, weight.mT, ends)
    if ctx.needs_input_grad[1]:
        d_weight = torch.ops.genai_pl.grouped_weight_gradient(d_y, x, ends)
    return d_x, d_weight, None


def _register() -> None:
    """Define both operators once: schema, kernels, shapes for tracing, gradient and FLOPs."""
    torch.library.define("genai_pl::grouped_linear", "(Tensor x, Tensor weight, Tensor ends) -> Tensor")
    torch.library.define("genai_pl::grouped_weight_gradient", "(Tensor d_y, Tensor x, Tensor ends) -> Tensor")
    shapes = {
        "grouped_linear": lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]),
        "grouped_weight_gradient": lambda d_y, x, ends: x.new_empty(ends.shape[0], d_y.shape[1], x.shape[1]),
    }
    for name, kernel in (("grouped_linear", _forward), ("grouped_weight_gradient", _weight_gradient)):
        for device in ("CUDA", "CPU"):
            torch.library.impl(f"genai_pl::{name}", device, kernel)
        torch.library.register_fake(f"genai_pl::{name}", shapes[name])
    torch.library.register_autograd("genai_pl::grouped_linear", _gradients, setup_context=_save)
    register_flop_formula(torch.ops.genai_pl.grouped_linear)(
        lambda x, weight, *_, **__: 2 * x[0] * weight[1] * weight[2]
    )
    register_flop_formula(torch.ops.genai_pl.grouped_weight_gradient)(
        lambda d_y, x, *_, **__: 2 * d_y[0] * d_y[1] * x[1]
    )


_register()
