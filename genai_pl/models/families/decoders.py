"""Decoders: GPT-2, Llama and its relatives, Gemma 3."""

from collections.abc import Iterator
from dataclasses import replace

from genai_pl.errors import ConfigError
from genai_pl.models.families.biases import ATTENTION_BIAS
from genai_pl.models.families.family import Codec, Family, Values, Weight, both, one
from genai_pl.models.families.rope import ROPE, TWO_ROPES
from genai_pl.names import Head, Norm, NormOrder, Position
from genai_pl.specs import ModelConfig


def _head(config: ModelConfig) -> tuple[Weight, ...]:
    if config.head is Head.score:
        return (one("score", "score"),)
    return () if config.tie_embeddings else (one("lm_head", "lm_head"),)


def _gpt2(config: ModelConfig) -> Iterator[Weight]:
    layer = "transformer.h.{i}"
    qkv = tuple(f"blocks.{{i}}.attention.{p}_proj" for p in "qkv")
    yield one("transformer.wte", "embed")
    yield one("transformer.wpe", "position")
    yield from both(f"{layer}.ln_1", "blocks.{i}.norm1")
    yield from both(f"{layer}.attn.c_attn", *qkv, transposed=True)
    yield from both(f"{layer}.attn.c_proj", "blocks.{i}.attention.o_proj", transposed=True)
    yield from both(f"{layer}.ln_2", "blocks.{i}.norm2")
    yield from both(f"{layer}.mlp.c_fc", "blocks.{i}.mlp.up_proj", transposed=True)
    yield from both(f"{layer}.mlp.c_proj", "blocks.{i}.mlp.down_proj", transposed=True)
    yield from both("transformer.ln_f", "norm")
    yield from _head(config)


def _llama(config: ModelConfig) -> Iterator[Weight]:
    theirs, ours = "model.layers.{i}", "blocks.{i}"
    yield one("model.embed_tokens", "embed")
    yield one("model.norm", "norm")
    yield one(f"{theirs}.input_layernorm", f"{ours}.norm1")
    yield one(f"{theirs}.post_attention_layernorm", f"{ours}.norm2")
    yield from _projections(config)
    yield from _head(config)


def _projections(config: ModelConfig) -> Iterator[Weight]:
    theirs, ours = "model.layers.{i}", "blocks.{i}"
    for p in "qkvo":
        yield one(f"{theirs}.self_attn.{p}_proj", f"{ours}.attention.{p}_proj")
    for p in ("gate", "up", "down"):
        yield one(f"{theirs}.mlp.{p}_proj", f"{ours}.mlp.{p}_proj")
    if config.qkv_bias:
        for p in "qkv":
            yield Weight(f"{theirs}.self_attn.{p}_proj.bias", (f"{ours}.attention.{p}_proj.bias",))
    if config.o_bias:
        yield Weight(f"{theirs}.self_attn.o_proj.bias", (f"{ours}.attention.o_proj.bias",))
    if config.qk_norm and config.norm_order is NormOrder.pre:
        for p in "qk":
            yield one(f"{theirs}.self_attn.{p}_norm", f"{ours}.attention.{p}_norm")


def _gemma3(config: ModelConfig) -> Iterator[Weight]:
    theirs, ours = "model.layers.{i}", "blocks.{i}"
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
        yield one(f"{theirs}.{name}", f"{ours}.{norm}", offset=1.0)
    yield from _projections(config)
    yield from _head(config)


def _classes(causal: str, scoring: str) -> dict[Head, tuple[str, ...]]:
    return {Head.linear: (causal,), Head.score: (scoring,)}


GPT2 = Family(
    model_type="gpt2",
    architectures=_classes("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    fixed={},
    fields={
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "intermediate_size": "n_inner",
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    constants={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    defaults={
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    weights=_gpt2,
    dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
)
LLAMA = Family(
    model_type="llama",
    architectures=_classes("LlamaForCausalLM", "LlamaForSequenceClassification"),
    fixed={
        "position": Position.rotary,
        "norm": Norm.rmsnorm,
        "gated_mlp": True,
        "bias": False,
    },
    fields={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_kv_head": "num_key_value_heads",
        "n_embd": "hidden_size",
        "head_dim": "head_dim",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "activation": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    constants={"mlp_bias": False},
    defaults={
        "attention_bias": False,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    weights=_llama,
    codecs=(ROPE, ATTENTION_BIAS),
)
UNBIASED = replace(LLAMA, fixed={**LLAMA.fixed, "qkv_bias": False}, codecs=(ROPE,))
MISTRAL = replace(
    UNBIASED,
    model_type="mistral",
    architectures=_classes("MistralForCausalLM", "MistralForSequenceClassification"),
    fields={**LLAMA.fields, "window": "sliding_window"},
    constants={},
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
)
QWEN2 = replace(
    UNBIASED,
    model_type="qwen2",
    architectures=_classes("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    fixed={**UNBIASED.fixed, "qkv_bias": True},
    constants={"use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32},
)
QWEN3 = replace(
    UNBIASED,
    model_type="qwen3",
    architectures=_classes("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    fixed={**UNBIASED.fixed, "qk_norm": True},
    constants={"attention_bias": False, "use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "head_dim": 128},
)


def _read_gemma3(values: Values) -> dict[str, object]:
    pattern = values.get("_sliding_window_pattern", values.get("sliding_window_pattern", 6))
    kinds = values.get("layer_types")
    if kinds and "full_attention" in kinds:
        pattern = kinds.index("full_attention") + 1
    asked = [(i + 1) % pattern == 0 for i in range(values["num_hidden_layers"])]
    if kinds and [kind == "full_attention" for kind in kinds] != asked:
        raise ConfigError("layer_types without a period are not supported")
    if not values["sliding_window"]:
        return {"window": None, "full_every": None, "attention_scale": values["query_pre_attn_scalar"] ** -0.5}
    window = {"window": values["sliding_window"], "full_every": pattern}
    return {**window, "attention_scale": values["query_pre_attn_scalar"] ** -0.5}


def _write_gemma3(config: ModelConfig) -> dict[str, object]:
    if config.window is None or config.full_every is None:
        raise ConfigError("Gemma 3 needs model.window and model.full_every")
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6:
        raise ConfigError("Gemma 3's query_pre_attn_scalar is an integer")
    full = [(i + 1) % config.full_every == 0 for i in range(config.n_layer)]
    return {
        "sliding_window": config.window,
        "sliding_window_pattern": config.full_every,
        "layer_types": ["full_attention" if here else "sliding_attention" for here in full],
        "query_pre_attn_scalar": round(scalar),
    }


GEMMA3 = replace(
    UNBIASED,
    model_type="gemma3_text",
    architectures={Head.linear: ("Gemma3ForCausalLM",)},
    fixed={
        **UNBIASED.fixed,
        "qk_norm": True,
        "norm_order": NormOrder.sandwich,
        "scale_embeddings": True,
    },
    fields={
        **LLAMA.fields,
        "activation": "hidden_activation",
        "softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    },
    constants={"attention_bias": False, "use_bidirectional_attention": False},
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    weights=_gemma3,
    codecs=(
        TWO_ROPES,
        Codec(
            _read_gemma3,
            _write_gemma3,
            (
                "sliding_window",
                "sliding_window_pattern",
                "_sliding_window_pattern",
                "layer_types",
                "query_pre_attn_scalar",
            ),
        ),
    ),
)
