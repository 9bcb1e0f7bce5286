"""Fused decoding: weights laid out for reading, and steps of one token with few operations, in float32 on a CPU.

A decoding step multiplies one token of each row with every weight, so it is as fast as weights come from memory. Two things
help, and neither changes a number beyond rounding:

1. Weights by columns. torch reads a matrix for a product with few rows at 24 to 28 GB/s by columns, at 16 to 20 by rows
   (one thread of an EPYC, torch 2.13).
2. Fewer operations. Decoders of Llama's kind spend a quarter of a step between their products. Here the weights that share
   an input are one matrix (q, k and v; gate and up), queries and keys are turned in one call, and norms are written out.

`prepare_for_decoding` does both in place, without memory for a second copy: the layers' own weights become views of the
concatenated ones. From then on the model is for reading; to train it, load it again.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Norm, NormOrder, Position
from genai_pl.kernels import AttentionMask, ScoreOptions, attention_with, positions_from_segments
from genai_pl.models.block import Block
from genai_pl.models.decoder import Decoder
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.positions import rotate


class FusedLayer(NamedTuple):
    """A block with its concatenated weights: qkv (H D + 2 K D, C), gate_up (2 F, C), each with its bias or None."""

    block: Block
    options: ScoreOptions
    qkv: Tensor
    qkv_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None


class FusedDecodeStep:
    """Hidden states (B, 1, C) of one more token (B, 1) of each row, equal to the decoder's `features` up to rounding.

    model: a decoder that `supports_fused_decode`; its weights become views of this step's.
    """

    def __init__(self, model: Decoder) -> None:
        self.model, self.config = model, model.config
        self.backend = model.config.attention.value
        self.layers = [_fuse(block) for block in model.blocks]

    def __call__(self, input_ids: Tensor, segment_ids: Tensor | None, cache: KVCache) -> Tensor:
        # positions of the new tokens; rows differ in length only if the cache has segments
        segments = cache.segments(segment_ids, 1)
        if segments is None:
            positions = torch.tensor([cache.n_text], device=input_ids.device)
        else:
            positions = positions_from_segments(segments)[:, -1:]
        x = self.model.embed_inputs(input_ids, positions)  # (B, 1, C)
        mask, table = AttentionMask(causal=True, segments=segments), self.model.rotary(positions)
        # the blocks, written out: pre-norm attention, pre-norm gated MLP
        for layer in self.layers:
            x = x + self._attend(self._normalize(x, layer.block.norm1), layer, mask, table, cache)
            y = self._normalize(x, layer.block.norm2)
            gate, up = F.linear(y, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            mlp = layer.block.mlp
            x = x + mlp.down_proj(mlp.activation(gate) * up)
        cache.advance(1)
        return self._normalize(x, self.model.norm)

    def _attend(
        self, x: Tensor, layer: FusedLayer, mask: AttentionMask, table: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        """Attention of one token, (B, 1, C) -> (B, 1, C): with T = 1 heads are split by `view` alone."""
        B, H, K = x.shape[0], self.config.n_head, self.config.n_kv_head
        heads = layer.block.attention
        y = F.linear(x, layer.qkv, layer.qkv_bias).view(B, H + 2 * K, 1, heads.head_dim)
        qk = rotate(y[:, : H + K], table)
        k, v = cache.update(heads.layer, qk[:, H:], y[:, H + K :])
        y = attention_with(qk[:, :H], k, v, mask, layer.options, backend=self.backend)
        return heads.o_proj(y.reshape(B, 1, -1))

    def _normalize(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        """RMSNorm in four operations; torch's own takes more, and slower, ones for a single token."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def prepare_for_decoding(model: nn.Module) -> bool:
    """Lay out the weights of a model that is only read from now on, in place; True if its steps are fused too.

    Only float32 weights on a CPU are touched; no memory is added. `train()` on the model is a RuntimeError afterwards: a
    step of an optimizer would write through views that several layers share.
    """
    is_fused = supports_fused_decode(model)
    if is_fused:
        model.fused_step = FusedDecodeStep(model)
    for module in model.modules():
        if type(module) is nn.Linear and _is_plain(module.weight):
            module.weight.data = _by_columns(module.weight.data)
    model.train = partial(_refuse_training, model)
    return is_fused


def supports_fused_decode(model: nn.Module) -> bool:
    """True if `FusedDecodeStep` computes what a step of this model does: a plain pre-norm decoder of Llama's kind.

    Every layer must be a bare `nn.Linear`: an adapter around one would be passed over.
    """
    if type(model) is not Decoder or not _is_plain(model.embed.weight):
        return False
    c = model.config
    kinds = (c.position, c.norm, c.norm_order, c.attention_kind)
    if (
        kinds != (Position.rotary, Norm.rmsnorm, NormOrder.pre, AttentionKind.full)
        or not c.gated_mlp
        or c.qk_norm
        or c.n_experts
    ):
        return False
    if set(model.windows) != {None} or c.share_layers or model.virtual is not None:
        return False
    return all(type(module) is nn.Linear for block in model.blocks for module in _linears(block))


def _refuse_training(model: nn.Module, mode: bool = True) -> nn.Module:
    """`model.train` of a prepared model: evaluation mode as always, training mode never."""
    if mode:
        raise RuntimeError("this model is prepared for decoding, its layers share memory: load it again to train it")
    return type(model).train(model, False)


def _linears(block: Block) -> list[nn.Module]:
    """The layers whose weights are concatenated: three with the input of attention, two with that of the MLP."""
    heads, mlp = block.attention, block.mlp
    return [heads.q_proj, heads.k_proj, heads.v_proj, mlp.gate_proj, mlp.up_proj]


def _fuse(block: Block) -> FusedLayer:
    linears = _linears(block)
    options = ScoreOptions(scale=block.attention.scale, softcap=block.attention.softcap)
    return FusedLayer(block, options, *_concatenated(linears[:3]), *_concatenated(linears[3:]))


def _concatenated(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias of several layers, whose own weights become views of it."""
    weight = _by_columns(torch.cat([linear.weight.detach() for linear in linears]))
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.detach() for linear in linears])


def _is_plain(weight: Tensor) -> bool:
    """True for a weight that reads faster by columns; a GPU and other dtypes have kernels for either layout."""
    return weight.dtype is torch.float32 and weight.device.type == "cpu"


def _by_columns(weight: Tensor) -> Tensor:
    """The same matrix with the entries of each column next to each other."""
    return weight.t().contiguous().t()
