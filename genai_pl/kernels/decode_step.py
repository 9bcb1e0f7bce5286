"""A decoding step of a whole decoder in one call: `decode_step.c`, for few rows of one token each.

The products are those of `row_products.c`; what lies between them (norms, rotation, the cache, attention of one query,
activations) costs more to call from Python than to compute. Numbers are those of the model's blocks up to rounding.
"""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from genai_pl.kernels.row_products import FLOATS, KINDS, SMALL, RowWeight, address_of, library, most_rows

NORMS = {"rms_norm": 0, "layer_norm": 1}  # as in the source
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}

Pointer = ctypes.c_void_p
Linear = tuple[RowWeight, Tensor | None]  # a packed weight and its bias
Norm = tuple[Tensor, Tensor | None]  # weight and bias


class StepLayer(NamedTuple):
    """Weights of a block: norms before attention and MLP, and of heads (H + K, 1, D); four packed matrices.

    up: rows of the gate before those of the other product, if the MLP has a gate.
    """

    norm1: Norm
    norm2: Norm
    head_norm: Norm | None
    qkv: Linear
    o: Linear
    up: Linear
    down: Linear


class Past(NamedTuple):
    """The KV cache of a step: buffers (L, B or more, K, columns, D), the first column (B,) that each row sees, and its last."""

    k: Tensor
    v: Tensor
    first_columns: Tensor
    column: int


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("kind", "out", "in_")]
    _fields_ += [(name, Pointer) for name in ("weight", "scales", "bias")]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", Pointer), ("bias", Pointer)]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Norm) for name in ("norm1", "norm2", "head_norm")]
    _fields_ += [(name, _Matrix) for name in ("qkv", "o", "up", "down")]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("n_layers", "C", "H", "K", "D", "F")]
    _fields_ += [(name, ctypes.c_long) for name in ("norm", "head_norm", "activation", "gated")]
    _fields_ += [(name, ctypes.c_float) for name in ("eps", "head_eps", "scale", "unused")]


class _Cache(ctypes.Structure):
    _fields_ = [("k", Pointer), ("v", Pointer), *((name, ctypes.c_long) for name in ("layer", "row", "head"))]
    _fields_ += [("first", Pointer), ("column", ctypes.c_long)]


class DecodeStep:
    """Hidden states after all blocks (B, 1, C) of one new token of each row, for up to `most_rows`.

    layers: weights in float32 or packed, all of one kind. H, K, D: query heads, key heads and head size. norm, activation:
    names in NORMS and ACTIVATIONS; the norms of heads are of the same kind. gated: an MLP of act(gate) * up.
    """

    def __init__(
        self,
        layers: Sequence[StepLayer],
        *,
        H: int,
        K: int,
        D: int,
        norm: str,
        activation: str,
        gated: bool,
        eps: float,
        head_eps: float,
        scale: float,
    ) -> None:
        self.tensors = layers  # the structures below hold addresses only
        names = {
            "norm": norm,
            "activation": activation,
            "gated": gated,
            "eps": eps,
            "head_eps": head_eps,
            "scale": scale,
        }
        self.options = {"H": H, "K": K, "D": D, **names}
        self.C, F = layers[0].qkv[0].width, layers[0].down[0].width
        kind = NORMS[norm]
        sizes = (len(layers), self.C, H, K, D, F, kind, kind, ACTIVATIONS[activation], int(gated))
        self.shape = _Shape(*sizes, eps, head_eps, scale, 0.0)
        self.layers = (_Layer * len(layers))(*map(_layer, layers))
        self.most_rows = most_rows(layers[0].qkv[0].dtype)
        self.is_small = layers[0].qkv[0].weight.numel() <= SMALL

    def __call__(self, x: Tensor, table: tuple[Tensor, Tensor] | None, past: Past) -> Tensor:
        """x (B, 1, C) after all blocks, in place; keys and values are written to the cache.

        table: cosines and sines (B or 1, 1, 1, D) of the tokens' positions, None without rotation.
        """
        (B, _, _), k, v = x.shape, past.k, past.v
        cosine, sine = (None, None) if table is None else (part.contiguous() for part in table)
        positions = 1 if cosine is None else cosine.shape[0]
        first = past.first_columns
        cache = _Cache(k.data_ptr(), v.data_ptr(), *k.stride()[:3], first.data_ptr(), past.column)
        threads = 1 if self.is_small else torch.get_num_threads()
        step = library()
        shape, cache = ctypes.byref(self.shape), ctypes.byref(cache)
        needed = step.decode_step_memory(shape, cache, B, threads)
        memory = torch.empty(needed, **FLOATS)  # of this call: several threads may take steps of one model
        tables = (None, None) if table is None else (cosine.data_ptr(), sine.data_ptr())
        step.decode_step(shape, self.layers, x.data_ptr(), *tables, positions, cache, B, threads, memory.data_ptr())
        return x

    def __reduce__(self) -> tuple:
        """The arguments: a copy has the addresses of its own tensors."""
        return partial(DecodeStep, **self.options), (self.tensors,)

    def takes(self, x: Tensor, past: Past) -> bool:
        """True for inputs of a step: float32 throughout, one token of each of few rows, heads of the cache side by side."""
        B, T, _ = x.shape
        floats = x.dtype is past.k.dtype is torch.float32 and x.is_contiguous()
        return floats and T == 1 and self.most_rows >= B and past.k.stride()[3:] == (self.shape.D, 1)


def _layer(layer: StepLayer) -> _Layer:
    norms = [_Norm(*map(address_of, norm or (None, None))) for norm in (layer.norm1, layer.norm2, layer.head_norm)]
    return _Layer(*norms, *map(_matrix, (layer.qkv, layer.o, layer.up, layer.down)))


def _matrix(linear: Linear) -> _Matrix:
    (weight, dtype, width, scales), bias = linear
    return _Matrix(KINDS[dtype], len(weight), width, weight.data_ptr(), address_of(scales), address_of(bias))
