"""gpt-oss: experts with biases behind a clamped SwiGLU, attention sinks, a window in every other layer (OpenAI 2025).

Its files hold the experts of a layer in one tensor, (experts, in, out), gate and up projection by turns. The published ones
are in MXFP4 (`mxfp4.py`), and are written again in the dtype of the model.
"""

from collections.abc import Iterator
from dataclasses import replace

from genai_pl.config.enums import Activation, Head, Router
from genai_pl.config.model import ModelConfig
from genai_pl.models.hf.families.biases import ATTENTION_BIAS
from genai_pl.models.hf.families.decoders import CAUSAL, LLAMA, UNBIASED, lm_head, projections
from genai_pl.models.hf.families.family import Codec, Values, Weight, both, one
from genai_pl.models.hf.families.layer_types import FULL_LAYER, WINDOW_LAYER, read_windows, write_windows
from genai_pl.models.hf.families.rope import ROPE

ROPE_DEFAULT = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _weights(config: ModelConfig) -> Iterator[Weight]:
    hf_layer, layer = "model.layers.{i}", "blocks.{i}"
    experts = f"{layer}.mlp.experts"
    yield one("model.embed_tokens", "embed")
    yield one("model.norm", "norm")
    yield one(f"{hf_layer}.input_layernorm", f"{layer}.norm1")
    yield one(f"{hf_layer}.post_attention_layernorm", f"{layer}.norm2")
    yield from projections(config)
    yield Weight(f"{hf_layer}.self_attn.sinks", (f"{layer}.attention.sinks",))
    yield from both(f"{hf_layer}.mlp.router", f"{layer}.mlp.router")
    gate_up = tuple(f"{experts}.{p}_proj" for p in ("gate", "up"))
    for name, ours in (("gate_up_proj", gate_up), ("down_proj", (f"{experts}.down_proj",))):
        weights, biases = (tuple(f"{one_name}.{kind}" for one_name in ours) for kind in ("weight", "bias"))
        layout = {"interleaved": len(ours) > 1}
        yield Weight(f"{hf_layer}.mlp.experts.{name}", weights, transposed=True, **layout)
        yield Weight(f"{hf_layer}.mlp.experts.{name}_bias", biases, **layout)
    yield from lm_head(config)


def _read_windows(values: Values) -> dict[str, object]:
    """The first layer has a window, the second has none, and so on, where config.json does not list them."""
    n, kinds = values["num_hidden_layers"], values.get("layer_types")
    return read_windows(values, [(WINDOW_LAYER, FULL_LAYER)[i % 2] for i in range(n)] if kinds is None else kinds)


def _read_rope(values: Values) -> dict[str, object]:
    """Rotary positions, scaled unless config.json says otherwise."""
    return ROPE.read(
        values if values.get("rope_parameters") is not None else {**values, "rope_parameters": ROPE_DEFAULT}
    )


WINDOWS = Codec(_read_windows, write_windows, ("layer_types", "sliding_window"))
GPT_OSS = replace(
    UNBIASED,
    model_type="gpt_oss",
    architectures={
        Head.linear: ("GptOssForCausalLM",),
        Head.score: ("GptOssForSequenceClassification",),
        Head.tokens: ("GptOssForTokenClassification",),
        Head.none: ("GptOssModel",),
    },
    fixed={
        **LLAMA.fixed,
        "bias": True,
        "activation": Activation.clamped_swiglu,
        "attention_sinks": True,
        "router": Router.softmax,  # over all experts and divided by the sum of the k: the softmax over the k
        "normalize_top_k": True,
        "router_bias": True,
    },
    fields={
        **{field: key for field, key in LLAMA.fields.items() if field != "activation"},
        "experts_per_token": "num_experts_per_tok",
        "n_experts": "num_local_experts",
        "expert_size": "intermediate_size",
        "swiglu_alpha": "swiglu_alpha",
        "swiglu_limit": "swiglu_limit",
    },
    constants={},
    defaults={
        "attention_bias": True,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "sliding_window": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "rope_theta": 150000.0,
    },
    weights=_weights,
    codecs=(ROPE._replace(read=_read_rope), ATTENTION_BIAS, CAUSAL, WINDOWS),
    synonyms=(("num_experts", "num_local_experts"),),
    quantizations=("mxfp4",),
)
