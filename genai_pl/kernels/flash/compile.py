"""Compilation without a GPU: the source, types and constants of a launch as Triton's launcher would give them.

`benchmarks/kernels_static.py` reads registers, spills and shared memory from the result, and slow tests check that every
kernel compiles for NVIDIA and AMD.
"""

from typing import Any

import torch
from torch import Tensor
from triton.compiler import ASTSource

from genai_pl.kernels.flash.common import Extras
from genai_pl.kernels.flash.launch import Launch, backward_launches, forward_launches
from genai_pl.kernels.flash.problem import Case, Problem

POINTERS = {  # Triton's names of pointer types
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def launches(q: Tensor, k: Tensor, v: Tensor, extras: Extras, case: Case, arch: str) -> list[Launch]:
    """Every kernel, forward and backward, that this case runs on `arch` (sm80, sm90, hip); the device may be any."""
    p = Problem(q, k, v, extras, case, arch)
    forward, o, lse = forward_launches(p)
    return forward + backward_launches(p, o, None, o, lse, need_bias=extras.bias is not None)[0]


def source(launch: Launch) -> ASTSource:
    """The kernel specialized for its arguments as the launcher would: `triton.compile(source, target=, options=)`."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for n, (parameter, value) in enumerate(zip(launch.kernel.params, launch.args, strict=True)):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[n,] = value
        else:
            specialize = not parameter.do_not_specialize
            signature[parameter.name] = _describe(value, (n,), constants, attributes, specialize=specialize)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _describe(value: Any, path: tuple[int, ...], constants: dict, attributes: dict, *, specialize: bool) -> Any:
    """Triton's type of an argument at a path into the argument list; constants and divisibility go into the dicts.

    specialize: whether the launcher compiles integers of 1, and multiples of 16, apart.
    """
    if isinstance(value, tuple):  # inside one, the launcher specializes everything
        types = [_describe(x, (*path, n), constants, attributes, specialize=True) for n, x in enumerate(value)]
        return type(value)(*types)
    if value is None or (specialize and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor) or (specialize and isinstance(value, int) and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"
