"""Decoders: GPT-2, Llama and its relatives, Gemma 3."""

from collections.abc import Iterator
from dataclasses import replace

from genai_pl.errors import ConfigError
from genai_pl.models.families.family import Codec, Family, Values, Weight, both, one
from genai_pl.models.families.rope import ROPE, TWO_ROPES
from genai_pl.names import Head, Norm, NormOrder, Position, Shape
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


def _classes(name: str) -> dict[Head, tuple[str, ...]]:
    return {
        Head.linear: (f"{name}ForCausalLM",),
        Head.score: (f"{name}ForSequenceClassification",),
        Head.none: (f"{name}Model",),
    }


def _read_causal(values: Values) -> dict[str, object]:
    if values.get("is_causal", True):
        return {}
    if any(str(name).endswith("ForSequenceClassification") for name in values.get("architectures") or ()):
        raise ConfigError("is_causal=false is not supported for a model that scores texts")
    return {"shape": Shape.encoder}


def _write_causal(config: ModelConfig) -> dict[str, object]:
    if config.shape is not Shape.encoder:
        return {}
    if "model_type" not in config.extra or config.head is Head.score:  # older readers take no notice of the key
        raise ConfigError("an encoder is written as a decoder only if it was read as one")
    return {"is_causal": False}


def _check_width(config: ModelConfig) -> dict[str, object]:
    if config.n_embd % config.n_head:  # transformers 5 refuses that, although head_dim may be another number
        raise ConfigError("hidden_size must be a multiple of num_attention_heads")
    return {}


CAUSAL = Codec(_read_causal, _write_causal, ("is_causal",))  # of transformers: a decoder whose tokens see all others
WIDTH = Codec(lambda values: {}, _check_width, ())
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)


GPT2 = Family(
    model_type="gpt2",
    architectures={**_classes("GPT2"), Head.linear: ("GPT2LMHeadModel",)},
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
    codecs=(CAUSAL,),
    dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    prefix="transformer.",
    ties=(("lm_head.weight", "transformer.wte.weight"),),
    synonyms=(
        ("hidden_size", "n_embd"),
        ("max_position_embeddings", "n_positions"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    ),
)
LLAMA = Family(
    model_type="llama",
    architectures=_classes("Llama"),
    fixed={
        "position": Position.rotary,
        "norm": Norm.rmsnorm,
        "gated_mlp": True,
        "bias": False,
        "qkv_bias": False,
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
    constants={"attention_bias": False, "mlp_bias": False},
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    weights=_llama,
    codecs=(ROPE, CAUSAL, WIDTH),
    prefix="model.",
    ties=TIED,
)


def _check_layer_types(values: Values) -> dict[str, object]:
    kinds = values.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * values["num_hidden_layers"]:
        raise ConfigError(f"layer_types={kinds!r} is not supported without a window")
    return {}


FULL = Codec(_check_layer_types, lambda config: {}, ("layer_types", "sliding_window", "max_window_layers"))
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architectures=_classes("Mistral"),
    fields={**LLAMA.fields, "window": "sliding_window"},
    constants={},
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
    codecs=(ROPE, CAUSAL),
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architectures=_classes("Qwen2"),
    fixed={**LLAMA.fixed, "qkv_bias": True},
    constants={"use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32},
    codecs=(ROPE, CAUSAL, FULL),
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architectures=_classes("Qwen3"),
    fixed={**LLAMA.fixed, "qk_norm": True},
    constants={"attention_bias": False, "use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "head_dim": 128},
    codecs=(ROPE, CAUSAL, FULL),
)


def _read_gemma3(values: Values) -> dict[str, object]:
    n, kinds = values["num_hidden_layers"], values.get("layer_types")
    pattern = values["sliding_window_pattern"]
    if kinds is None:
        kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(n)]
    elif len(kinds) != n or not {*kinds} <= {"full_attention", "sliding_attention"}:
        raise ConfigError(f"layer_types={kinds!r} must say full_attention or sliding_attention for each of {n} layers")
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else max(pattern, n + 1)
    if [kind == "full_attention" for kind in kinds] != [(i + 1) % every == 0 for i in range(n)]:
        raise ConfigError(f"layer_types={kinds!r} without a period are not supported")
    if values["sliding_window"] is None and "sliding_attention" in kinds:
        raise ConfigError("sliding_window=None is not supported where layer_types has sliding_attention")
    window = {"window": values["sliding_window"], "full_every": every if values["sliding_window"] else None}
    return {**window, "attention_scale": values["query_pre_attn_scalar"] ** -0.5}


def _write_gemma3(config: ModelConfig) -> dict[str, object]:
    if config.window is None:
        raise ConfigError("Gemma 3 needs model.window")
    scalar = (config.attention_scale or config.head_dim**-0.5) ** -2
    if abs(scalar - round(scalar)) > 1e-6:
        raise ConfigError("Gemma 3's query_pre_attn_scalar is an integer")
    every = config.full_every or config.n_layer + 1
    full = [(i + 1) % every == 0 for i in range(config.n_layer)]
    return {
        "sliding_window": config.window,
        "sliding_window_pattern": every,
        "layer_types": ["full_attention" if here else "sliding_attention" for here in full],
        "query_pre_attn_scalar": round(scalar),
    }


GEMMA3 = replace(
    LLAMA,
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
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
    },
    weights=_gemma3,
    codecs=(
        TWO_ROPES,
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
