"""Gemma 3, the text decoder: windows in most layers, norms before and after each part, two rotary bases."""

from collections.abc import Iterator
from dataclasses import replace

from genai_pl.config.enums import Head, NormOrder
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.biases import ATTENTION_BIAS
from genai_pl.models.hf.families.decoders import CAUSAL, LLAMA, UNBIASED, WIDTH, lm_head, projections
from genai_pl.models.hf.families.family import Codec, Values, Weight, one
from genai_pl.models.hf.families.layer_types import FULL_LAYER, WINDOW_LAYER, read_windows, write_windows
from genai_pl.models.hf.families.rope import TWO_ROPES


def _gemma3(config: ModelConfig) -> Iterator[Weight]:
    hf_layer, layer = "model.layers.{i}", "blocks.{i}"
    norms = {
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm1_after",
        "pre_feedforward_layernorm": "norm2",
        "post_feedforward_layernorm": "norm2_after",
        "self_attn.q_norm": "attention.q_norm",
        "self_attn.k_norm": "attention.k_norm",
    }
    yield one("model.embed_tokens", "embed")
    yield one("model.norm", "norm", offset=1.0)  # it multiplies by 1 + weight
    for name, norm in norms.items():
        yield one(f"{hf_layer}.{name}", f"{layer}.{norm}", offset=1.0)
    yield from projections(config)
    yield from lm_head(config)


def _read_gemma3(values: Values) -> dict[str, object]:
    """Windows and scale. Layers may be listed by kind or stated by a period."""
    n, kinds, pattern = values["num_hidden_layers"], values.get("layer_types"), values["sliding_window_pattern"]
    if kinds is None:
        kinds = [FULL_LAYER if (i + 1) % pattern == 0 else WINDOW_LAYER for i in range(n)]
    return {**read_windows(values, kinds, period=pattern), "attention_scale": values["query_pre_attn_scalar"] ** -0.5}


def _write_gemma3(config: ModelConfig) -> dict[str, object]:
    """Both forms: transformers 4 reads the period, 5 the list."""
    if config.window is None:
        raise ConfigError("Gemma 3 needs model.window")
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6:
        raise ConfigError("Gemma 3's query_pre_attn_scalar is an integer")
    period = {"sliding_window_pattern": config.full_every or config.n_layer + 1}
    return {**write_windows(config), **period, "query_pre_attn_scalar": round(scalar)}


GEMMA3 = replace(
    UNBIASED,
    model_type="gemma3_text",
    architectures={
        Head.linear: ("Gemma3ForCausalLM",),
        Head.score: ("Gemma3TextForSequenceClassification",),
        Head.none: ("Gemma3TextModel",),
    },
    fixed={
        **LLAMA.fixed,
        "qk_norm": True,
        "norm_order": NormOrder.sandwich,
        "scale_embeddings": True,
    },
    fields={
        **LLAMA.fields,
        "activation": "hidden_activation",
        "logit_softcap": "final_logit_softcapping",
    },
    # transformers 5 reads attn_logit_softcapping, and does not pass it to attention
    constants={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    defaults={
        "attention_bias": False,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "final_logit_softcapping": None,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    },
    weights=_gemma3,
    codecs=(
        TWO_ROPES,
        ATTENTION_BIAS,
        CAUSAL,
        WIDTH,
        Codec(
            _read_gemma3,
            _write_gemma3,
            (
                "sliding_window",
                "sliding_window_pattern",
                "layer_types",
                "query_pre_attn_scalar",
            ),
        ),
    ),
)
