"""Models that are only read, in float32 on a CPU: weights that are read faster, and steps of decoding with few operations.

A step that reads one token of each row is as fast as its weights are read: by columns 24 to 28 GB/s where by rows it is 16
to 20 (one thread of an EPYC, torch 2.13). In decoders of Llama's kind it spends a quarter of its time between its products
besides. There weights that are multiplied with the same input are one, queries and keys are turned together, and norms
are written out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genai_pl.config.enums import AttentionKind, Norm, NormOrder, Position
from genai_pl.kernels import AttentionMask, attention, positions_from_segments
from genai_pl.models.block import Block
from genai_pl.models.decoder import Decoder
from genai_pl.models.kv_cache import KVCache
from genai_pl.models.positions import rotate


class Layer(NamedTuple):
    """A block, with its concatenated weights and biases."""

    block: Block
    qkv: Tensor
    qkv_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None


class FusedDecodeStep:
    """Hidden states (B, 1, C) of one more token (B, 1) of each row, as the decoder's `features` gives them."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.config = model, model.config
        self.layers = [_layer(block) for block in model.blocks]

    def __call__(self, input_ids: Tensor, segment_ids: Tensor | None, cache: KVCache) -> Tensor:
        segments = cache.segments(segment_ids, 1)
        if segments is None:
            positions = torch.tensor([cache.n_text], device=input_ids.device)
        else:
            positions = positions_from_segments(segments)[:, -1:]
        x = self.model.embed_inputs(input_ids, positions)
        mask, table = AttentionMask(causal=True, segments=segments), self.model.rotary(positions)
        for layer in self.layers:
            x = x + self._attend(self._normalize(x, layer.block.norm1), layer, mask, table, cache)
            gate, up = F.linear(self._normalize(x, layer.block.norm2), layer.gate_up, layer.gate_up_bias).chunk(
                2, dim=-1
            )
            mlp = layer.block.mlp
            x = x + mlp.down_proj(mlp.activation(gate) * up)
        cache.advance(1)
        return self._normalize(x, self.model.norm)

    def _attend(
        self, x: Tensor, layer: Layer, mask: AttentionMask, table: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        B, H, K = x.shape[0], self.config.n_head, self.config.n_kv_head
        attention_layer = layer.block.attention
        y = F.linear(x, layer.qkv, layer.qkv_bias).view(B, H + 2 * K, 1, attention_layer.head_dim)
        qk = rotate(y[:, : H + K], table)
        k, v = cache.update(attention_layer.layer, qk[:, H:], y[:, H + K :])
        options = {
            "scale": attention_layer.scale,
            "softcap": attention_layer.softcap,
            "backend": self.config.attention.value,
        }
        return attention_layer.o_proj(attention(qk[:, :H], k, v, mask, **options).reshape(B, 1, -1))

    def _normalize(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        # what torch's own does for this in more, and slower, operations
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def prepare_for_decoding(model: nn.Module) -> bool:
    """Ready a model that is only read from now on; whether it can take such steps. No memory is added."""
    is_fused = supports_fused_decode(model)
    if is_fused:
        model.fused_step = FusedDecodeStep(model)
    for module in model.modules():
        if type(module) is nn.Linear and _is_plain(module.weight):
            module.weight.data = _by_columns(module.weight.data)
    return is_fused


def supports_fused_decode(model: nn.Module) -> bool:
    """Whether a step of this model is what `FusedDecodeStep` computes."""
    if type(model) is not Decoder or not _is_plain(model.embed.weight):
        return False
    c = model.config
    kinds = (c.position, c.norm, c.norm_order, c.attention_kind)
    if kinds != (Position.rotary, Norm.rmsnorm, NormOrder.pre, AttentionKind.full) or not c.gated_mlp or c.qk_norm:
        return False
    if set(model.windows) != {None} or c.share_layers or model.virtual is not None:
        return False
    return all(type(module) is nn.Linear for block in model.blocks for module in _linears(block))


def _linears(block: Block) -> list[nn.Module]:
    attention_layer, mlp = block.attention, block.mlp
    return [attention_layer.q_proj, attention_layer.k_proj, attention_layer.v_proj, mlp.gate_proj, mlp.up_proj]


def _layer(block: Block) -> Layer:
    linears = _linears(block)
    return Layer(block, *_concatenated(linears[:3]), *_concatenated(linears[3:]))


def _concatenated(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias of several layers, whose own weights become parts of it."""
    weight = _by_columns(torch.cat([linear.weight.detach() for linear in linears]))
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    if linears[0].bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.detach() for linear in linears])


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype is torch.float32 and weight.device.type == "cpu"


def _by_columns(weight: Tensor) -> Tensor:
    """The same matrix with the entries of each column next to each other."""
    return weight.t().contiguous().t()
