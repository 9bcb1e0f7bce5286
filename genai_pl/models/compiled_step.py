"""The compiled decoding step of a model: its packed weights and options as `kernels/decode_step.py` takes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from genai_pl.kernels.decode_step import ACTIVATIONS, DecodeStep, StepLayer
from genai_pl.models.layers import GLU
from genai_pl.models.packed_linear import PackedLinear

if TYPE_CHECKING:
    from genai_pl.models.decoder import Decoder
    from genai_pl.models.fused_decode import FusedBlock


def compiled_step(model: "Decoder", layers: Sequence["FusedBlock"]) -> DecodeStep | None:
    """All blocks, their weights packed for compiled products, as one call; None for a model with options that it lacks."""
    first, config = layers[0], model.config
    activation, gated = config.activation.value, first.gate_up is not None
    plain_scores = first.options.softcap is None and first.options.sinks is None
    plain_mlp = activation in ACTIVATIONS and (not gated or type(first.mlp.glu) is GLU)
    if not plain_scores or not plain_mlp:
        return None
    head_norm = first.qk_norm

    def packed(layer: PackedLinear) -> tuple:
        return layer.packed, layer.bias

    return DecodeStep(
        [
            StepLayer(
                (layer.norm1.weight, layer.norm1.bias),
                (layer.norm2.weight, layer.norm2.bias),
                None if layer.qk_norm is None else (layer.qk_norm.plain_weight, layer.qk_norm.bias),
                packed(layer.qkv),
                packed(layer.heads.o_proj),
                packed(layer.gate_up if gated else layer.mlp.up_proj),
                packed(layer.mlp.down_proj),
            )
            for layer in layers
        ],
        H=config.n_head,
        K=config.n_kv_head,
        D=config.head_dim,
        norm="rms_norm" if first.norm1.is_rms else "layer_norm",
        activation=activation,
        gated=gated,
        eps=first.norm1.eps,
        head_eps=0.0 if head_norm is None else head_norm.eps,
        scale=first.heads.scale,
    )
