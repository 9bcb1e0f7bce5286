"""Decoders: GPT-2, Llama, Mistral, Qwen 2 and Qwen 3."""

from collections.abc import Iterator
from dataclasses import replace

from genai_pl.config.enums import Head, Norm, NormOrder, Position, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.biases import ATTENTION_BIAS
from genai_pl.models.hf.families.family import Codec, Family, Values, Weight, both, one
from genai_pl.models.hf.families.rope import ROPE


def lm_head(config: ModelConfig, token_head: str = "score") -> tuple[Weight, ...]:
    """The rows after a decoder's last norm: a head for labels, an untied language-model head, or none."""
    if config.head is Head.score:
        return (one("score", "score"),)
    if config.head is Head.tokens:
        return both(token_head, "score")
    return () if config.tie_embeddings or config.head is Head.none else (one("lm_head", "lm_head"),)


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
    yield from lm_head(config, token_head="classifier")


def _llama(config: ModelConfig) -> Iterator[Weight]:
    hf_layer, layer = "model.layers.{i}", "blocks.{i}"
    yield one("model.embed_tokens", "embed")
    yield one("model.norm", "norm")
    yield one(f"{hf_layer}.input_layernorm", f"{layer}.norm1")
    yield one(f"{hf_layer}.post_attention_layernorm", f"{layer}.norm2")
    yield from projections(config)
    yield from lm_head(config)


def projections(config: ModelConfig) -> Iterator[Weight]:
    """The rows of attention and dense MLPs in Llama's layout, with the biases and norms that the configuration has."""
    hf_layer, layer = "model.layers.{i}", "blocks.{i}"
    for p in "qkvo":
        yield one(f"{hf_layer}.self_attn.{p}_proj", f"{layer}.attention.{p}_proj")
    mixtures = config.mixture_layers
    dense = tuple(n for n in range(config.n_layer) if n not in mixtures) if mixtures else None
    for p in ("gate", "up", "down"):
        yield one(f"{hf_layer}.mlp.{p}_proj", f"{layer}.mlp.{p}_proj", layers=dense)
    if config.qkv_bias:
        for p in "qkv":
            yield Weight(f"{hf_layer}.self_attn.{p}_proj.bias", (f"{layer}.attention.{p}_proj.bias",))
    if config.o_bias:
        yield Weight(f"{hf_layer}.self_attn.o_proj.bias", (f"{layer}.attention.o_proj.bias",))
    if config.qk_norm and config.norm_order is NormOrder.pre:
        for p in "qk":
            yield one(f"{hf_layer}.self_attn.{p}_norm", f"{layer}.attention.{p}_norm")


def _classes(name: str) -> dict[Head, tuple[str, ...]]:
    """transformers' classes of a family by their heads."""
    return {
        Head.linear: (f"{name}ForCausalLM",),
        Head.score: (f"{name}ForSequenceClassification",),
        Head.tokens: (f"{name}ForTokenClassification",),
        Head.none: (f"{name}Model",),
    }


def _read_causal(values: Values) -> dict[str, object]:
    """is_causal=false makes an encoder of a decoder's weights, as some embedding models are."""
    if values.get("is_causal", True):
        return {}
    if any(str(name).endswith("Classification") for name in values.get("architectures") or ()):
        raise ConfigError("is_causal=false is not supported for a model that scores texts or tokens")
    return {"shape": Shape.encoder}


def _write_causal(config: ModelConfig) -> dict[str, object]:
    if config.shape is not Shape.encoder:
        return {}
    if "model_type" not in config.extra or config.head.scores:  # older versions of transformers ignore the key
        raise ConfigError("an encoder is written as a decoder only if it was read as one")
    return {"is_causal": False}


def _check_width(config: ModelConfig) -> dict[str, object]:
    if config.n_embd % config.n_head:  # transformers 5 refuses it, although head_dim may be another number
        raise ConfigError("hidden_size must be a multiple of num_attention_heads")
    return {}


CAUSAL = Codec(_read_causal, _write_causal, ("is_causal",))
WIDTH = Codec(lambda values: {}, _check_width, ())
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)


GPT2 = Family(
    model_type="gpt2",
    quantizations=(),  # they would store the transpose of what its own layers store
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
    codecs=(ROPE, ATTENTION_BIAS, CAUSAL, WIDTH),
    prefix="model.",
    ties=TIED,
)
# Llama without attention_bias, of which the families below are variants
UNBIASED = replace(LLAMA, fixed={**LLAMA.fixed, "qkv_bias": False}, codecs=(ROPE, CAUSAL))


def _check_layer_types(values: Values) -> dict[str, object]:
    """ConfigError unless every layer has full attention; Qwen states the kind of each."""
    kinds = values.get("layer_types")
    if kinds is not None and (len(kinds) != values["num_hidden_layers"] or {*kinds} != {"full_attention"}):
        raise ConfigError(f"layer_types={kinds!r} is not supported without a window")
    return {}


FULL = Codec(_check_layer_types, lambda config: {}, ("layer_types", "sliding_window", "max_window_layers"))
MISTRAL = replace(
    UNBIASED,
    model_type="mistral",
    architectures=_classes("Mistral"),
    fields={**LLAMA.fields, "window": "sliding_window"},
    constants={},
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
    codecs=(ROPE, CAUSAL),
)
QWEN2 = replace(
    UNBIASED,
    model_type="qwen2",
    architectures=_classes("Qwen2"),
    fixed={**UNBIASED.fixed, "qkv_bias": True},
    constants={"use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32},
    codecs=(ROPE, CAUSAL, FULL),
)
QWEN3 = replace(
    UNBIASED,
    model_type="qwen3",
    architectures=_classes("Qwen3"),
    fixed={**LLAMA.fixed, "qk_norm": True},
    constants={"use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "head_dim": 128},
    codecs=(ROPE, ATTENTION_BIAS, CAUSAL, FULL),
)
