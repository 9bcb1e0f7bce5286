"""Quantized bases: frozen weights in 4 bits (nf4) or 8 (int8), dequantized for each product (QLoRA, Dettmers et al. 2023).

The codes are held by a tensor subclass, `Quantized`, which behaves as the dequantized weight in every operation. So adapters,
merging, checkpoints and `.to()` work unchanged; only `QuantizedLinear` knows about codes, for its memory in backward.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from genai_pl.errors import ConfigError
from genai_pl.kernels.int8 import from_int8, to_int8
from genai_pl.kernels.nf4 import BLOCK, GROUP, from_nf4, to_nf4
from genai_pl.kernels.row_products import FEW, RowWeight, is_built, multiply_rows, widened
from genai_pl.peft.targets import ALL_LINEAR, ModuleSite, adapter_layers, match, module_sites

aten = torch.ops.aten
KINDS = ("nf4", "int8")


class Quantized(Tensor):
    """A weight (out, in) held as codes and scales; operations receive the dequantized weight.

    codes, scales: as `to_int8` returns them; for nf4 the blocks of `to_nf4`, which hold both, and no further scales (0,).
    kind: "nf4" or "int8". dtype: of the weight that it stands for.
    `__torch_dispatch__` handles what must keep the codes (detach, clone, `.to()`, copy_); all else sees `dense()`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, kind: str, shape: torch.Size, dtype: torch.dtype) -> "Quantized":
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scales: Tensor, kind: str, shape: torch.Size, dtype: torch.dtype) -> None:
        self.codes, self.scales, self.kind = codes, scales, kind

    def __repr__(self) -> str:
        return f"Quantized({self.kind}, {list(self.shape)}, {self.dtype})"

    def dense(self) -> Tensor:
        """The dequantized weight (out, in) in its dtype, by compiled code where there is any; the numbers are the same."""
        rows = self.by_rows()
        if rows is not None:
            return widened(rows).to(self.dtype)
        if self.kind == "nf4":
            return from_nf4(self.codes, self.shape).to(self.dtype)
        return from_int8(self.codes, self.scales, self.shape).to(self.dtype)

    def by_rows(self) -> RowWeight | None:
        """The same memory for compiled products; None without them or memory, off the CPU, where blocks of nf4 cross rows."""
        has_memory = type(self.codes) is Tensor and self.codes.device.type == "cpu"  # fake tensors have none
        if torch.compiler.is_compiling() or not has_memory or not is_built():
            return None
        out, width = self.shape
        if self.kind == "int8":
            return RowWeight(self.codes, torch.int8, width, self.scales)
        return RowWeight(self.codes.view(out, width // GROUP * BLOCK), "nf4", width) if width % GROUP == 0 else None

    def each(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "Quantized":
        """The same weight with `change` applied to codes and scales, to move or copy them for example."""
        tensors = (change(self.codes), change(self.scales))
        return type(self)(*tensors, self.kind, self.shape, self.dtype if dtype is None else dtype)

    # torch.compile takes a subclass apart by these two methods
    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype]]:
        return ["codes", "scales"], (self.kind, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        tensors: dict[str, Tensor], kind_and_dtype: tuple[str, torch.dtype], shape: torch.Size, stride: tuple[int, ...]
    ) -> "Quantized":
        return Quantized(tensors["codes"], tensors["scales"], kind_and_dtype[0], torch.Size(shape), kind_and_dtype[1])

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        # operations that keep the codes; a cast changes only the dtype of the result
        if function in (aten.detach.default, aten.alias.default):
            return args[0].each(function)
        if function is aten.clone.default:
            return args[0].each(torch.clone)
        if function is aten._to_copy.default and kwargs.get("dtype", torch.float32).is_floating_point:
            device = kwargs.get("device")
            return args[0].each(lambda part: part.to(device, copy=True), kwargs.get("dtype"))
        if function is aten.copy_.default and isinstance(args[0], cls):  # DDP broadcasts weights at the start
            codes, scales = quantized(args[1], args[0].kind)
            args[0].codes.copy_(codes)
            args[0].scales.copy_(scales)
            return args[0]
        # everything else computes with the dequantized weight
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs))
        return function(*args, **kwargs)


def quantized(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight. Quantizing a dequantized weight again gives the same codes, so copies stay exact."""
    weight = (weight.dense() if isinstance(weight, Quantized) else weight).contiguous()
    return to_int8(weight) if kind == "int8" else (to_nf4(weight), torch.empty(0, device=weight.device))


class Product(torch.autograd.Function):
    """x W^T whose backward pass keeps the quantized weight and dequantizes it again; only x has a gradient.

    F.linear would keep the dequantized weight of every layer until backward, which is the memory that quantization saves.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: Quantized) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, weight.dense())

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ ctx.weight.dense().to(gradient.dtype)).to(ctx.dtype), None


class QuantizedLinear(nn.Linear):
    """x W^T + b, (..., in) -> (..., out), with a quantized, frozen W. kind: "nf4" or "int8"."""

    def __init__(self, base: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        weight = base.weight.detach()
        codes = Quantized(*quantized(weight, kind), kind, weight.shape, weight.dtype)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.by_rows() if self._decodes(x) else None
        if rows is not None:
            return multiply_rows(x, rows, self.bias)
        y = Product.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _decodes(self, x: Tensor) -> bool:
        """True for few rows in float32 without gradients: those of a decoding step, which dequantizing would take longest of."""
        if torch.is_grad_enabled() or x.dtype is not torch.float32 or self.weight.dtype is not torch.float32:
            return False
        return x.numel() <= FEW * self.in_features and not torch.is_autocast_enabled(x.device.type)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # the default swaps the contents of the parameter, which torch refuses once the layer is compiled
        weight = self._parameters.pop("weight")
        super()._apply(fn, recurse)
        self.weight = nn.Parameter(fn(weight), requires_grad=False)
        return self


def quantize(model: nn.Module, *, kind: str, keep: Sequence[str] = ()) -> nn.Module:
    """The model with the linear layers of its blocks quantized, except those named in `keep`.

    ConfigError for an unknown kind, and for a model that is quantized to the other kind already.
    """
    if kind not in KINDS:
        raise ConfigError(f"peft.quantize={kind} is not one of {', '.join(KINDS)}")
    for site in match(model, ALL_LINEAR, default=()):
        if isinstance(site.inner, QuantizedLinear):
            if site.inner.weight.kind != kind:
                raise ConfigError(f"peft.quantize={kind}: this model is quantized to {site.inner.weight.kind} already")
        elif not any(map(site.is_called, keep)):
            _replace_base(site, QuantizedLinear(site.inner, kind))
    return model


def dequantize(model: nn.Module) -> nn.Module:
    """The model with plain, frozen linear layers in place of the quantized ones."""
    for site in module_sites(model):
        if isinstance(site.inner, QuantizedLinear):
            plain = nn.Linear(site.inner.in_features, site.inner.out_features, bias=False, device="meta")
            plain.weight, plain.bias = nn.Parameter(site.inner.weight.dense(), requires_grad=False), site.inner.bias
            _replace_base(site, plain)
    return model


def _replace_base(site: ModuleSite, module: nn.Module) -> None:
    """Replace the innermost module of a site, inside the adapter layers around it."""
    layers = adapter_layers(site.module)
    if layers:
        layers[-1].base = module.train(layers[-1].training)
    else:
        site.replace(module)
