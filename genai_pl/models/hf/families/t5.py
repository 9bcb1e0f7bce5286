"""T5: v1.0 (ReLU, a tied and scaled head) and v1.1 or Flan (gated GELU, a head of its own).

{i} counts layers of the encoder, {j} of the decoder. Each stack has one table of relative positions, in its first layer.
"""

from collections.abc import Iterator

from genai_pl.config.enums import Activation, Head, Norm, Position, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import Codec, Family, Values, Weight, one

ACTIVATIONS = {
    "relu": Activation.relu,
    "gelu": Activation.gelu_tanh,
    "silu": Activation.silu,
}  # "gated-gelu" is the tanh approximation


def _t5(config: ModelConfig) -> Iterator[Weight]:
    yield one("shared", "decoder.embed")
    for stack, i in (("encoder", "{i}"), ("decoder", "{j}")):
        hf_layer, layer = f"{stack}.block.{i}.layer", f"{stack}.blocks.{i}"
        yield one(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias", f"{stack}.relative.table")
        yield one(f"{stack}.final_layer_norm", f"{stack}.norm")
        yield one(f"{hf_layer}.0.layer_norm", f"{layer}.norm1")
        for p in "qkvo":
            yield one(f"{hf_layer}.0.SelfAttention.{p}", f"{layer}.attention.{p}_proj")
        if stack == "decoder":
            yield one(f"{hf_layer}.1.layer_norm", f"{layer}.norm_cross")
            for p in "qkvo":
                yield one(f"{hf_layer}.1.EncDecAttention.{p}", f"{layer}.cross.{p}_proj")
        yield from _mlp(config, f"{hf_layer}.{1 if stack == 'encoder' else 2}", layer)
    if not config.tie_embeddings:
        yield one("lm_head", "decoder.lm_head")


def _mlp(config: ModelConfig, hf_layer: str, layer: str) -> Iterator[Weight]:
    """The norm and MLP of a layer; wi_0 is the gate."""
    yield one(f"{hf_layer}.layer_norm", f"{layer}.norm2")
    if config.gated_mlp:
        yield one(f"{hf_layer}.DenseReluDense.wi_0", f"{layer}.mlp.gate_proj")
        yield one(f"{hf_layer}.DenseReluDense.wi_1", f"{layer}.mlp.up_proj")
    else:
        yield one(f"{hf_layer}.DenseReluDense.wi", f"{layer}.mlp.up_proj")
    yield one(f"{hf_layer}.DenseReluDense.wo", f"{layer}.mlp.down_proj")


def _read(values: Values) -> dict[str, object]:
    """Activation, gate, head scale, ties and the decoder's layers; ConfigError where keys contradict each other."""
    if "is_causal" in values:  # true hides what follows from the encoder (sdpa alone), false shows it to the decoder
        raise ConfigError(f"is_causal={values['is_causal']!r} is not supported for model_type 't5'")
    gate, _, name = values["feed_forward_proj"].rpartition("-")
    if gate not in ("", "gated") or name not in ACTIVATIONS or (not gate and name == "gelu"):
        raise ConfigError(f"feed_forward_proj={values['feed_forward_proj']!r} is not supported")
    derived = {"is_gated_act": gate == "gated", "dense_act_fn": "gelu_new" if name == "gelu" else name}
    for key, value in derived.items():  # transformers writes these too, and reads them
        if values.get(key, value) != value:
            raise ConfigError(f"{key}={values[key]!r} with feed_forward_proj={values['feed_forward_proj']!r}")
    # transformers 5 reads scale_decoder_outputs, and without it tie_word_embeddings, which implied the scale before
    scaled = values.get("scale_decoder_outputs", values.get("tie_word_embeddings", True) is not False)
    return {
        "activation": ACTIVATIONS[name],
        "gated_mlp": gate == "gated",
        "scale_head": scaled,
        "decoder_start_token_id": values.get("decoder_start_token_id"),
        # a tied head without scale becomes an untied copy: transformers 4 would scale it
        "tie_embeddings": scaled and values.get("tie_word_embeddings", True) is not False,
        "n_decoder_layer": values["num_layers"]
        if values["num_decoder_layers"] is None
        else values["num_decoder_layers"],
    }


def _write(config: ModelConfig) -> dict[str, object]:
    """The keys that `_read` reads; ConfigError for a combination that T5 does not have."""
    if config.tie_embeddings and not config.scale_head:
        raise ConfigError("T5 scales a tied head")
    name = next((name for name, activation in ACTIVATIONS.items() if activation is config.activation), None)
    if name is None or (name == "gelu" and not config.gated_mlp):
        raise ConfigError("an activation that T5 has not")
    # keys at transformers' defaults are left out
    values = {
        "feed_forward_proj": f"gated-{name}" if config.gated_mlp else name,
        "tie_word_embeddings": config.tie_embeddings,
        "num_decoder_layers": config.n_decoder_layer,
        "is_encoder_decoder": True,
    }
    if config.scale_head and not config.tie_embeddings:
        values["scale_decoder_outputs"] = True
    if config.decoder_start_token_id is not None:
        values["decoder_start_token_id"] = config.decoder_start_token_id
    return values


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
    constants={"is_encoder_decoder": True},
    defaults={
        "n_positions": 512,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
        "num_decoder_layers": None,
    },
    weights=_t5,
    codecs=(
        Codec(
            _read,
            _write,
            (
                "feed_forward_proj",
                "tie_word_embeddings",
                "scale_decoder_outputs",
                "num_decoder_layers",
                "decoder_start_token_id",
                "is_causal",
                "is_gated_act",
                "dense_act_fn",
            ),
        ),
    ),
    dropouts=("dropout_rate",),
    always_ties=True,
    ties=(
        ("lm_head.weight", "shared.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
    ),
    synonyms=(
        ("hidden_size", "d_model"),
        ("num_attention_heads", "num_heads"),
        ("num_hidden_layers", "num_layers"),
        ("head_dim", "d_kv"),
    ),
)
