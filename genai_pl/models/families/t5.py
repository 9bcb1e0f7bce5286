"""T5: v1.0 (ReLU, tied and scaled head) and v1.1 or Flan (gated, a head of its own)."""

from collections.abc import Iterator

from genai_pl.errors import ConfigError
from genai_pl.models.families.family import Codec, Family, Values, Weight, one
from genai_pl.names import Activation, Head, Norm, Position, Shape
from genai_pl.specs import ModelConfig

ACTIVATIONS = {"relu": Activation.relu, "gelu": Activation.gelu_tanh, "silu": Activation.silu}  # gated-gelu is by tanh


def _t5(config: ModelConfig) -> Iterator[Weight]:
    yield one("shared", "decoder.embed")
    for stack, i in (("encoder", "{i}"), ("decoder", "{j}")):
        theirs, ours = f"{stack}.block.{i}.layer", f"{stack}.blocks.{i}"
        yield one(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.relative.table")
        yield one(f"{stack}.final_layer_norm", f"{stack}.norm")
        yield one(f"{theirs}.0.layer_norm", f"{ours}.norm1")
        for p in "qkvo":
            yield one(f"{theirs}.0.SelfAttention.{p}", f"{ours}.attention.{p}_proj")
        if stack == "decoder":
            yield one(f"{theirs}.1.layer_norm", f"{ours}.norm_cross")
            for p in "qkvo":
                yield one(f"{theirs}.1.EncDecAttention.{p}", f"{ours}.cross.{p}_proj")
        yield from _mlp(config, f"{theirs}.{1 if stack == 'encoder' else 2}", ours)
    if not config.tie_embeddings:
        yield one("lm_head", "decoder.lm_head", instead="shared.weight")


def _mlp(config: ModelConfig, theirs: str, ours: str) -> Iterator[Weight]:
    yield one(f"{theirs}.layer_norm", f"{ours}.norm2")
    if config.gated_mlp:
        yield one(f"{theirs}.DenseReluDense.wi_0", f"{ours}.mlp.gate_proj")
        yield one(f"{theirs}.DenseReluDense.wi_1", f"{ours}.mlp.up_proj")
    else:
        yield one(f"{theirs}.DenseReluDense.wi", f"{ours}.mlp.up_proj")
    yield one(f"{theirs}.DenseReluDense.wo", f"{ours}.mlp.down_proj")


def _read(values: Values) -> dict[str, object]:
    gate, _, name = values["feed_forward_proj"].rpartition("-")
    if gate not in ("", "gated") or name not in ACTIVATIONS or (not gate and name == "gelu"):
        raise ConfigError(f"feed_forward_proj={values['feed_forward_proj']!r} is not supported")
    # transformers 5 says with the second key what the first said before: whether the head is tied, and then scaled
    v1_0 = values.get("tie_word_embeddings", True) is not False and values.get("scale_decoder_outputs", True)
    return {
        "activation": ACTIVATIONS[name],
        "gated_mlp": gate == "gated",
        "tie_embeddings": v1_0,
        "scale_head": v1_0,
        "n_decoder_layer": values.get("num_decoder_layers") or values["num_layers"],
    }


def _write(config: ModelConfig) -> dict[str, object]:
    if config.tie_embeddings != config.scale_head:
        raise ConfigError("T5 scales a tied head, and no other")
    name = next((name for name, ours in ACTIVATIONS.items() if ours is config.activation), None)
    if name is None or (name == "gelu" and not config.gated_mlp):
        raise ConfigError("an activation that T5 has not")
    return {
        "feed_forward_proj": f"gated-{name}" if config.gated_mlp else name,
        "tie_word_embeddings": config.tie_embeddings,
        "num_decoder_layers": config.n_decoder_layer,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
    }


T5 = Family(
    model_type="t5",
    architectures={Head.linear: ("T5ForConditionalGeneration",)},
    fixed={
        "shape": Shape.encoder_decoder,
        "position": Position.relative,
        "norm": Norm.rmsnorm,
        "bias": False,
        "attention_scale": 1.0,
    },
    fields={
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_embd": "d_model",
        "head_dim": "d_kv",
        "intermediate_size": "d_ff",
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "relative_buckets": "relative_attention_num_buckets",
        "relative_max_distance": "relative_attention_max_distance",
        "norm_eps": "layer_norm_epsilon",
    },
    constants={},
    defaults={
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    weights=_t5,
    codecs=(
        Codec(
            _read, _write, ("feed_forward_proj", "tie_word_embeddings", "scale_decoder_outputs", "num_decoder_layers")
        ),
    ),
    dropouts=("dropout_rate",),
)
