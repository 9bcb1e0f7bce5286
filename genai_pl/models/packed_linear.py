"""Packed layers: the linear layers and the embedding of a model that is only read, with weights in 16, 8 or 4 bits.

Hidden states, norms and the KV cache stay in float32, so only what is read most is small: the weights of products. A
packed model has no parameters for them any more; it cannot be trained, saved or moved.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.devices import CODES
from genai_pl.errors import ConfigError
from genai_pl.kernels.packed_product import BF16, LACKS, Product
from genai_pl.kernels.row_products import FLOATS, multiply_rows
from genai_pl.models.block import Block
from genai_pl.models.encoder_decoder import EncoderDecoder
from genai_pl.models.experts import Dispatch, ExpertLinear
from genai_pl.models.frozen import FrozenLinear, RoundedLinear
from genai_pl.models.layers import GatedMLP
from genai_pl.models.transformer import Transformer
from genai_pl.models.virtual_tokens import VirtualTokens

OURS = ("torch.nn.", "genai_pl.models.")  # packages of the modules that `pack_weights` knows: no adapters

HEAD = "lm_head"  # the output head's name in all our models
BITS = {torch.int8: 8, torch.int4: 5}  # of a weight that is codes, with its part of scales


class PackedLinear(nn.Module):
    """x W^T + b, (..., in) -> (..., out) in float32, by a product that owns the packed weight.

    `forward` adds `more` (..., out) too, if it is given.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, product: Product) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.multiply, self.packed = product.multiply, product.pack(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = x.float()  # under autocast it may be rounded
        if self.multiply is multiply_rows:
            return multiply_rows(x, self.packed, self.bias, more)
        y = self.multiply(x, self.packed)
        y = y if self.bias is None else y + self.bias
        return y if more is None else more + y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        _refuse_change(fn)
        return super()._apply(fn, recurse)


class PackedExperts(nn.Module):
    """x W_e^T + b_e for rows sorted by expert, (N k, in) -> (N k, out) in float32: `ExpertLinear` with packed weights."""

    def __init__(self, layer: ExpertLinear, product: Product) -> None:
        super().__init__()
        self.out_features = layer.out_features
        biases = [None] * len(layer.weight) if layer.bias is None else layer.bias
        self.experts = nn.ModuleList(PackedLinear(*pair, product) for pair in zip(layer.weight, biases, strict=True))

    def forward(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        y, start = x.new_empty(len(x), self.out_features, dtype=torch.float32), 0
        for expert, end in zip(self.experts, dispatch.ends.tolist(), strict=True):
            if end > start:
                y[start:end] = expert(x[start:end])
            start = end
        return y


class ChannelsOf(nn.Module):
    """Output channels start to stop of a linear layer that several layers of one input were joined to."""

    def __init__(self, joined: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.joined, self.channels = joined, slice(start, stop)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x)[..., self.channels]


class PackedEmbedding(nn.Module):
    """Embeddings (..., C) in float32 from a table (V, C) of 16 bits: a step reads one row, so 8 bits would save no time.

    weight: no numbers, (0, C); it has the dtype and the device of the result, which callers ask for.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.table = weight.detach().to(torch.bfloat16 if dtype in CODES.values() else dtype)
        self.weight = nn.Parameter(torch.empty(0, self.embedding_dim, **FLOATS), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.table).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedEmbedding":
        _refuse_change(fn)
        return super()._apply(fn, recurse)


def is_packable(model: nn.Module) -> bool:
    """True for a model of ours on a CPU, without adapters: they would read the weights of the layers that they wrap."""
    if not isinstance(model, Transformer | EncoderDecoder) or any(p.device.type != "cpu" for p in model.parameters()):
        return False
    return all(
        type(module).__module__.startswith(OURS) and not isinstance(module, VirtualTokens) for module in model.modules()
    )


def check_packable(model: nn.Module, dtype: torch.dtype) -> None:
    """ConfigError for a model whose weights cannot be packed as codes of this dtype."""
    name = str(dtype).removeprefix("torch.")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise ConfigError(f"dtype={name} multiplies on a CPU: set device=cpu, or a dtype or precision of 16 bits")
    if not is_packable(model):
        raise ConfigError(
            f"dtype={name} takes a model of a family of ours without adapters: "
            "merge them first (export.py format=merged), or leave dtype out"
        )


def pack_weights(model: nn.Module, dtype: torch.dtype, product: Product, head: Product) -> None:
    """Replace the linear layers, experts and token embeddings of a packable model, in place; the rest becomes float32.

    head: the product of the output head. Layers that are packed already stay. A scoring head, of few channels, keeps float32.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if module not in replaced and type(module) is nn.Linear and name != "score":
                replaced[module] = PackedLinear(module.weight, module.bias, head if name == HEAD else product)
            elif module not in replaced and type(module) is ExpertLinear:
                replaced[module] = PackedExperts(module, product)
            elif module not in replaced and name == "embed" and type(module) is nn.Embedding:
                replaced[module] = PackedEmbedding(module.weight, dtype)
            if module in replaced:
                setattr(parent, name, replaced[module])
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def bytes_when_packed(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that `pack_weights` makes of linear layers and token embeddings, for int8 or int4."""
    bits = 0
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, ExpertLinear):
            bits += module.weight.numel() * (BITS[torch.int8] if name.endswith(HEAD) else BITS[dtype])
        elif type(module) is nn.Embedding and name.endswith("embed"):
            bits += module.weight.numel() * 16
    return bits // 8


@contextmanager
def packed_products(model: nn.Module) -> Iterator[None]:
    """Context without gradients in which linear layers on a CPU multiply by packed bfloat16 copies of their weights.

    For many tokens from weights that stay, as in a rollout: packed once, not for every token. Weights need 16 bits more each
    meanwhile. Adapters keep their effect, as they call the layer that they wrap. Always the same product, since a probe
    could choose another one after a resume, which samples other tokens. Without effect where torch has not that product.
    """
    layers = [module for module in model.modules() if type(module) in (nn.Linear, FrozenLinear, RoundedLinear)]
    try:
        try:
            for layer in layers:
                layer.forward = PackedLinear(layer.weight, layer.bias, BF16).forward
        except LACKS:
            _unpack(layers)
        yield
    finally:
        _unpack(layers)


def _unpack(layers: Iterable[nn.Module]) -> None:
    """Give layers the forward pass of their class again."""
    for layer in layers:
        layer.__dict__.pop("forward", None)


def equalize(model: nn.Module) -> None:
    """Scale channels inside the gated MLPs of a packable model, in place: the same function, which loses less in 8 bits.

    A few channels of act(gate) * up are far above the others, and errors of their weights in `down` count as often. The
    expected size of a channel is the product of the norms of its rows in gate and up; its square root divides the row of
    up, whose scale in 8 bits absorbs it, and multiplies the column of down (after Nagel et al. 2019, section 4.1).
    """
    for block in (block for block in model.modules() if isinstance(block, Block) and isinstance(block.mlp, GatedMLP)):
        mlp, norm = block.mlp, block.norm2 if block.pre_norm else block.norm1
        gate, up = ((layer.weight.float() * norm.weight).norm(dim=1) for layer in (mlp.gate_proj, mlp.up_proj))
        size = (gate * up).sqrt().clamp_min(1e-6)  # (F,)
        size = size / size.mean()
        mlp.up_proj.weight.data = mlp.up_proj.weight.data / size[:, None]
        if mlp.up_proj.bias is not None:
            mlp.up_proj.bias.data = mlp.up_proj.bias.data / size
        mlp.down_proj.weight.data = mlp.down_proj.weight.data * size


def _refuse_change(fn: Callable[[Tensor], Tensor]) -> None:
    """RuntimeError for a function of `Module._apply` that moves or casts: packed weights are of this CPU."""
    probe = torch.empty(0, **FLOATS)
    changed = fn(probe)
    if changed.device != probe.device or changed.dtype != probe.dtype:
        raise RuntimeError("this model's weights are packed for products on a CPU: load it again to move or cast it")
