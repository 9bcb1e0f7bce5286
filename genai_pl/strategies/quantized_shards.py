"""Quantized weights under FSDP2: each rank holds codes and scales of some rows, and these are gathered, never the weight.

FSDP2 shards a parameter by rows, and lets a tensor subclass say what is gathered in its place. A shard must begin a block of
codes. Each row does in int8, and in nf4 where 64 divides the length of a row; other weights stay whole on every rank.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from genai_pl.distributed.dtensor import full_tensor_on_cpu, is_dtensor, local_shard
from genai_pl.kernels.nf4 import GROUP
from genai_pl.peft.quantize import Quantized, QuantizedLinear

aten = torch.ops.aten
Tensors = tuple[Tensor, ...]


class QuantizedShard(Quantized):
    """Rows of a quantized weight, as many as its shape says. Behind them codes and scales may hold the padding of a shard.

    Fields as of `Quantized`. The operations of FSDP2 that cut, pad and move a parameter keep the codes; all others see
    `dense()`.
    """

    @property
    def parts(self) -> Tensors:
        """The tensors that ranks gather, with their padding: codes, and scales where codes do not hold them."""
        return (self.codes, self.scales) if self.kind == "int8" else (self.codes,)

    def rows(self, first: int, n: int) -> Quantized:
        """Rows from `first` on as a weight of their own: views of codes and scales."""
        width = self.shape[1]
        shape = torch.Size((n, width))
        if self.kind == "int8":
            parts = (part[first : first + n] for part in self.parts)
        else:
            parts = (self.codes[first * width // GROUP : (first + n) * width // GROUP], self.scales)
        return Quantized(*parts, self.kind, shape, self.dtype)

    def dense(self) -> Tensor:
        """The dequantized rows (n, in), without padding."""
        return self.rows(0, self.shape[0]).dense()

    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[Tensors, None]:
        """The tensors of this rank that FSDP2 gathers. Their sizes are those of every rank, as they are padded."""
        return self.parts, None

    def fsdp_post_all_gather(
        self, gathered: Tensors, metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple["QuantizedShard", Tensors] | None:
        """The rows of all ranks, in the memory where FSDP2 has gathered them; None for `out`, which lies there already.

        In the dtype of the weight, where other weights would have that of products: the product casts, as in one process.
        """
        if out is not None:
            return None
        codes, scales = gathered if self.kind == "int8" else (*gathered, self.scales)
        rows = len(codes) if self.kind == "int8" else len(codes) * GROUP // self.shape[1]
        return _like(self, codes, scales, rows), ()

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function in BY_ROWS and isinstance(args[0], cls):
            return BY_ROWS[function](*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


def prepare_shards(model: nn.Module, n_ranks: int) -> list[nn.Parameter]:
    """Let FSDP2 shard the codes of a model's quantized weights, in place; returns the weights that stay whole.

    On one rank all do: FSDP2 would copy the first of their tensors alone (torch 2.13).
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        weight = layer.weight
        if is_cut_by_row(weight) and n_ranks > 1:
            shard = _like(weight, weight.codes, weight.scales, len(weight))
            layer.weight = nn.Parameter(shard, requires_grad=False)
    return [layer.weight for layer in layers if not isinstance(layer.weight, QuantizedShard)]


def is_cut_by_row(weight: Quantized) -> bool:
    """Whether each row of a weight begins a block of codes."""
    return weight.kind == "int8" or weight.shape[1] % GROUP == 0


def is_quantized_shard(value: Tensor) -> bool:
    """Whether a tensor is a DTensor of codes."""
    return is_dtensor(value) and isinstance(local_shard(value), QuantizedShard)


def full_codes_on_cpu(value: DTensor) -> Quantized:
    """The whole quantized weight, in RAM (a collective)."""
    own = local_shard(value)
    parts = [DTensor.from_local(part, value.device_mesh, value.placements, run_check=False) for part in own.parts]
    codes, scales = (*map(full_tensor_on_cpu, parts), own.scales.cpu())[:2]
    return _like(own, codes, scales, len(value)).rows(0, len(value))


def _like(weight: Quantized, codes: Tensor, scales: Tensor, rows: int) -> QuantizedShard:
    """Codes and scales of so many rows of a weight."""
    return QuantizedShard(codes, scales, weight.kind, torch.Size((rows, weight.shape[1])), weight.dtype)


def _split(weight: QuantizedShard, size: int, dim: int = 0) -> list[QuantizedShard]:
    """The weight cut into parts of `size` rows."""
    assert dim == 0, "FSDP2 cuts by rows"
    cuts = [weight.rows(first, min(size, len(weight) - first)) for first in range(0, len(weight), size)]
    return [_like(cut, cut.codes, cut.scales, len(cut)) for cut in cuts]


def _zeros(weight: QuantizedShard, shape: Sequence[int], **_: object) -> QuantizedShard:
    """Codes of a shard that is to be filled: of zeros in both kinds, as scales are 0."""
    width = weight.shape[1]
    blocks = shape[0] if weight.kind == "int8" else shape[0] * width // GROUP
    codes = weight.codes.new_zeros(blocks, *weight.codes.shape[1:])
    scales = weight.scales.new_zeros(shape[0] if weight.kind == "int8" else 0)
    return _like(weight, codes, scales, shape[0])


def _first_rows(weight: QuantizedShard, dim: int, start: int, end: int) -> QuantizedShard:
    """The weight without its padding, which codes and scales keep for gathers."""
    assert dim == start == 0, "FSDP2 cuts padding from the end"
    return _like(weight, weight.codes, weight.scales, min(end, len(weight)))


def _copy(target: QuantizedShard, source: QuantizedShard) -> QuantizedShard:
    """The target with the codes of the source, which has as many rows."""
    into, given = (weight.rows(0, len(source)) for weight in (target, source))
    into.codes.copy_(given.codes)
    into.scales.copy_(given.scales)
    return target


BY_ROWS: dict[object, Callable] = {
    aten.split.Tensor: _split,
    aten.new_zeros.default: _zeros,
    aten.slice.Tensor: _first_rows,
    aten.copy_.default: _copy,
    # of what was gathered, in the shape of the weight
    aten.as_strided.default: lambda weight, shape, *_: weight.rows(0, shape[0]),
    # flat, for gathers of what has no `fsdp_pre_all_gather`: it is kept, and not read
    aten.view.default: lambda weight, shape: weight.each(torch.Tensor.detach),
    aten.is_pinned.default: lambda weight, *_: weight.codes.is_pinned(),
    aten._pin_memory.default: lambda weight, *_: weight.each(torch.Tensor.pin_memory),
}
