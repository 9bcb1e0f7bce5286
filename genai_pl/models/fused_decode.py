"""Fused decoding: weights laid out for reading, and passes with few operations, on a CPU.

A decoding step multiplies one token of each row with every weight, so it is as fast as weights come from memory. Three
things help:

1. Fewer bytes. Weights of 16 bits, `dtype=int8` and `dtype=int4` stay so; everything else is float32.
2. The product that a probe finds fastest here (`kernels/packed_product.py`): for few rows mostly one that is compiled
   (`kernels/row_products.py`), which reads weights at the speed of memory with any number of threads. Weights that
   cannot be packed are laid out by columns, where torch reads them faster so. No number changes beyond rounding.
3. Fewer operations. Decoders of Llama's and GPT-2's kinds spend a quarter of a step between their products. Here the
   weights that share an input are one matrix (q, k and v; gate and up), a product adds the residual stream, queries and
   keys are normed and turned in one call, and norms are compiled or written out. Where products are compiled, so are
   all blocks of a step of one token each (`kernels/decode_step.py`).

`prepare_for_decoding` does all in place, without memory for a second copy. From then on the model is for reading; to
train it, load it again.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.config.enums import NormOrder
from genai_pl.devices import CODES
from genai_pl.kernels import AttentionMask, ScoreOptions, attention_with, positions_from_segments
from genai_pl.kernels.decode_step import DecodeStep
from genai_pl.kernels.packed_product import LAYOUTS, Product, by_columns, fastest_product, products_of
from genai_pl.kernels.row_products import multiply_rows, rms_norm_rows, rotate_rows
from genai_pl.models.attention import Attention
from genai_pl.models.block import Block
from genai_pl.models.compiled_step import compiled_step
from genai_pl.models.decoder import Decoder, has_uniform_steps
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.layers import MLP, GatedMLP
from genai_pl.models.packed_linear import (
    HEAD,
    ChannelsOf,
    PackedLinear,
    bytes_when_packed,
    check_packable,
    equalize,
    is_packable,
    pack_weights,
)
from genai_pl.models.positions import rotate

log = logging.getLogger(__name__)

PROBED_BYTES = 32 << 20  # of the weights that a probe multiplies with, in 16 bits: about what caches hold


class FusedNorm:
    """RMSNorm or LayerNorm over the last C channels, in few operations.

    weight, bias: those of the norm, (C,), or of several norms of one kind, (H, 1, C). compiled: by the library of rows.
    """

    def __init__(
        self, norm: nn.RMSNorm | nn.LayerNorm, weight: Tensor, bias: Tensor | None, *, compiled: bool = False
    ) -> None:
        self.weight, self.bias, self.eps, self.shape = weight, bias, norm.eps, norm.normalized_shape
        self.plain_weight = weight
        self.is_rms = isinstance(norm, nn.RMSNorm)
        self.compiled = compiled and self.is_rms and weight.dim() == 1
        C = weight.shape[-1]
        if self.is_rms:
            self.eps = torch.finfo(weight.dtype).eps if norm.eps is None else norm.eps
        if self.is_rms and not self.compiled:
            self.weight, self.root_eps = weight * C**0.5, weight.new_tensor((C * self.eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if self.compiled:
            return rms_norm_rows(x, self.weight, self.eps)
        if self.is_rms:  # x / sqrt(mean(x^2) + eps) = x sqrt(C) / sqrt(|x|^2 + C eps)
            length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.root_eps)
            return x / length * self.weight
        if self.weight.dim() == 1:
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)
        y = F.layer_norm(x, self.shape, eps=self.eps) * self.weight
        return y if self.bias is None else y + self.bias


class FusedBlock:
    """A block with joined layers: `qkv`, (..., C) -> (..., H D + 2 K D), and `feed_forward`, (..., C) -> (..., C)."""

    def __init__(self, block: Block, product: Product | None, layout: Callable[[Tensor], Tensor]) -> None:
        heads, mlp = block.attention, block.mlp
        self.heads, self.mlp = heads, mlp
        self.options = ScoreOptions(scale=heads.scale, softcap=heads.softcap, sinks=heads.sinks)
        self.compiled = product is not None and product.multiply is multiply_rows
        self.norm1, self.norm2 = (_fused_norm(norm, compiled=self.compiled) for norm in (block.norm1, block.norm2))
        self.qk_norm = _fused_head_norm(heads)
        self.qkv = _join(heads, ("q_proj", "k_proj", "v_proj"), product, layout)
        self.gate_up = _join(mlp, ("gate_proj", "up_proj"), product, layout) if isinstance(mlp, GatedMLP) else None

    def attention_out(self, x: Tensor, attended: Tensor) -> Tensor:
        """x plus the output projection of what was attended to, both (B, T, C)."""
        return _add_product(x, self.heads.o_proj, attended)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x plus the MLP of its norm, (B, T, C)."""
        hidden = self.norm2(x)
        if self.gate_up is None:
            hidden = self.mlp.activation(self.mlp.up_proj(hidden))
        else:
            hidden = self.mlp.glu(*self.gate_up(hidden).chunk(2, dim=-1))
        return _add_product(x, self.mlp.down_proj, hidden)


class FusedForward:
    """Hidden states (B, T, C) of T tokens, equal to the decoder's `features` up to rounding.

    model: a decoder that `supports_fused_decode`; its weights are packed by a product or, without one, become views of
    this one's, which `layout` puts in order.
    """

    def __init__(self, model: Decoder, product: Product | None, layout: Callable[[Tensor], Tensor]) -> None:
        self.model, self.config = model, model.config
        self.backend = model.config.attention.value
        self.layers = [FusedBlock(block, product, layout) for block in model.blocks]
        self.norm = _fused_norm(model.norm, compiled=self.layers[0].compiled)
        self.step: DecodeStep | None = None  # all blocks in one call

    def __call__(self, input_ids: Tensor, segment_ids: Tensor | None, cache: KVCache | None) -> Tensor:
        model, T = self.model, input_ids.shape[1]
        # positions of all tokens; rows differ in length only if there are segments
        segments = segment_ids if cache is None else cache.segments(segment_ids, T)
        if segments is None:
            end = T if cache is None else cache.n_text + T
            positions = torch.arange(end - T, end, device=input_ids.device)
            model.check_length(end)
        else:
            positions = positions_from_segments(segments)
            model.check_length(model.longest(positions))
            positions = positions[:, -T:]
        x = model.embed_inputs(input_ids, positions)  # (B, T, C)
        table = None if model.rotary is None else model.rotary(positions)
        if self.step is not None and cache is not None and T == 1:
            past = cache.past(segments)
            if self.step.takes(x, past):
                x = self.step(x, table, past)
                cache.advance(T)
                return self.norm(x)
        mask = AttentionMask(causal=True, segments=segments)
        # the blocks, written out: pre-norm attention, pre-norm MLP
        for layer in self.layers:
            x = layer.attention_out(x, self._attend(layer.norm1(x), layer, mask, table, cache))
            x = layer.feed_forward(x)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def _attend(
        self,
        x: Tensor,
        layer: FusedBlock,
        mask: AttentionMask,
        table: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Attention before its output projection, (B, T, C) -> (B, T, H D)."""
        (B, T, _), H, K = x.shape, self.config.n_head, self.config.n_kv_head
        y = layer.qkv(x).view(B, T, H + 2 * K, -1)
        in_place = layer.compiled and table is not None and layer.qk_norm is None
        if in_place:
            rotate_rows(y, table, H + K)
        y = y.transpose(1, 2)  # (B, H + 2 K, T, D)
        qk, v = y[:, : H + K], y[:, H + K :]
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        if table is not None and not in_place:
            qk = rotate(qk, table)
        k = qk[:, H:]
        if cache is not None:
            k, v = cache.update(layer.heads.layer, k, v)
        y = attention_with(qk[:, :H], k, v, mask, layer.options, backend=self.backend)
        return y.transpose(1, 2).reshape(B, T, -1)


def prepare_for_decoding(
    model: nn.Module, dtype: torch.dtype | None = None, *, rows: int = 1, product: Product | None = None
) -> bool:
    """Lay out the weights of a model that is only read from now on, in place; True if its passes are fused too.

    dtype: of the weights in products, None for the model's own. ConfigError for int8 and int4 where they cannot be; others and
    devices than a CPU's stay as they are. rows: tokens of a typical step, one of each sequence, for the probe of products.
    product: the one to take, without a probe.
    `train()` on the model is a RuntimeError afterwards: a step of an optimizer would write through views that several
    layers share.
    """
    if dtype in CODES.values():
        check_packable(model, dtype)
    is_given, layout = product is not None, by_columns
    product = product if is_given else _choose_product(model, dtype, rows)
    if product in LAYOUTS:  # weights stay parameters, in another order
        product, layout = None, product.pack
        for module in _plain_linears(model):
            module.weight.data = layout(module.weight.data)
    elif product is not None:
        dtype = model.embed.weight.dtype if dtype is None else dtype
        size = f", weights of {bytes_when_packed(model, dtype) / 1e6:,.1f} MB" if dtype in CODES.values() else ""
        if not is_given:
            log.info("decoding    products of %s%s", product.name, size)
        head = _choose_head(model, dtype, product, rows)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter.data = parameter.data.float()
        if dtype is torch.int8:
            equalize(model)
    # joined layers first: the others are packed one by one
    is_fused = supports_fused_decode(model) and (product is not None or _is_plain(model.embed.weight))
    if is_fused:
        model.fused = FusedForward(model, product, layout)
    if product is not None:
        pack_weights(model, dtype, product, head)
    if is_fused and model.fused.layers[0].compiled:
        model.fused.step = compiled_step(model, model.fused.layers)
    model.train = partial(_refuse_training, model)
    return is_fused


def supports_fused_decode(model: nn.Module, *, inner: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> bool:
    """True if `FusedForward` computes what this model does: a pre-norm decoder of Llama's or GPT-2's kind.

    Every layer must be a bare `nn.Linear`: an adapter around one would be passed over. inner: of a layer, what is asked
    instead, for a model whose adapters will be merged.
    """
    if not has_uniform_steps(model):
        return False
    c = model.config
    if c.norm_order is not NormOrder.pre or c.qk_norm_joint or c.share_layers:
        return False
    if any(type(block.mlp) not in (MLP, GatedMLP) for block in model.blocks):
        return False
    return all(type(inner(module)) is nn.Linear for block in model.blocks for module in _linears(block))


def _choose_product(model: nn.Module, dtype: torch.dtype | None, rows: int) -> Product | None:
    """The fastest product for the model's weights, or None for a model whose weights stay as they are.

    Weights that cannot be packed, as those that an adapter reads, may still be laid out in another order.
    """
    dtype = model.embed.weight.dtype if dtype is None else dtype
    candidates = products_of(dtype) if is_packable(model) and not _is_packed(model) else []
    if candidates:
        linears = [module for block in model.blocks for module in block.modules() if type(module) is nn.Linear]
        return fastest_product(candidates, _probed(linears), rows=rows)
    linears = _plain_linears(model)
    return fastest_product(LAYOUTS, _probed(linears), rows=rows) if linears else None


def _choose_head(model: nn.Module, dtype: torch.dtype, product: Product, rows: int) -> Product:
    """The product of the output head: 8 bits beside int4, since each of its errors is one of a logit."""
    if dtype is not torch.int4:
        return product
    candidates = products_of(torch.int8)
    if product.multiply is multiply_rows:
        return candidates[0]
    heads = [module for name, module in model.named_modules() if name.endswith(HEAD)]
    return fastest_product(candidates, _probed(heads), rows=rows) if heads else product


def _plain_linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear and _is_plain(module.weight)]


def _probed(linears: Iterable[nn.Linear]) -> list[Tensor]:
    """Weights of a model's own shapes, in its order, for a probe."""
    weights: list[Tensor] = []
    for linear in linears:
        if 2 * sum(weight.numel() for weight in weights) < PROBED_BYTES:
            weights.append(linear.weight.detach())
    return weights


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _refuse_training(model: nn.Module, mode: bool = True) -> nn.Module:
    """`model.train` of a prepared model: evaluation mode as always, training mode never."""
    if mode:
        raise RuntimeError("this model is prepared for decoding, its layers share memory: load it again to train it")
    return type(model).train(model, False)


def _linears(block: Block) -> list[nn.Module]:
    """The layers that are joined, and those beside them: all matrices of a block."""
    heads, mlp = block.attention, block.mlp
    return [*heads.column_layers, *heads.row_layers, *mlp.column_layers, *mlp.row_layers]


def _fused_norm(norm: nn.Module, *, compiled: bool) -> FusedNorm:
    bias = getattr(norm, "bias", None)
    return FusedNorm(norm, norm.weight.detach(), None if bias is None else bias.detach(), compiled=compiled)


def _fused_head_norm(heads: Attention) -> FusedNorm | None:
    """The norms of queries and keys as one, with a weight for each of H + K heads; None if there are none."""
    if isinstance(heads.q_norm, nn.Identity):
        return None
    norms = [heads.q_norm] * (heads.q_proj.out_features // heads.head_dim)
    norms += [heads.k_norm] * (heads.k_proj.out_features // heads.head_dim)
    weight = torch.stack([norm.weight.detach() for norm in norms])[:, None]  # (H + K, 1, D)
    has_bias = isinstance(heads.q_norm, nn.LayerNorm) and heads.q_norm.bias is not None
    bias = torch.stack([norm.bias.detach() for norm in norms])[:, None] if has_bias else None
    return FusedNorm(heads.q_norm, weight, bias)


def _join(
    parent: nn.Module, names: Sequence[str], product: Product | None, layout: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """One layer for several of one input; these become views of its weight or, if it is packed, of its results."""
    linears = [parent.get_submodule(name) for name in names]
    sizes = [linear.out_features for linear in linears]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    if product is None:
        weight = layout(weight)
        for linear, part in zip(linears, weight.split(sizes), strict=True):
            linear.weight.data = part
        return partial(F.linear, weight=weight, bias=bias)
    joined, start = PackedLinear(weight, bias, product), 0
    for name, size in zip(names, sizes, strict=True):
        setattr(parent, name, ChannelsOf(joined, start, start + size))
        start += size
    return joined


def _add_product(x: Tensor, layer: nn.Module, y: Tensor) -> Tensor:
    """x plus the linear layer of y; a packed layer adds while it multiplies."""
    return layer(y, x) if isinstance(layer, PackedLinear) else x + layer(y)


def _is_plain(weight: Tensor) -> bool:
    """True for a weight that reads faster by columns; a GPU has kernels for either layout."""
    return weight.dtype is torch.float32 and weight.device.type == "cpu"
