"""Decoders with experts: Mixtral, Qwen3-MoE, OLMoE and dots.llm1, whose files hold a matrix for each expert."""

from collections.abc import Iterator
from dataclasses import replace

from genai_pl.config.enums import Head, Router
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.biases import ATTENTION_BIAS
from genai_pl.models.hf.families.decoders import CAUSAL, FULL, LLAMA, UNBIASED, lm_head, projections
from genai_pl.models.hf.families.family import Codec, Family, Values, Weight, one
from genai_pl.models.hf.families.rope import ROPE

PROJECTIONS = ("gate", "up", "down")


def _weights(config: ModelConfig, *, mlp: str = "mlp", names: tuple[str, ...] = ()) -> Iterator[Weight]:
    """Llama's tensors with routers and experts in the place of some MLPs; {e} is the expert.

    mlp: the module that holds the experts in the file. names: of an expert's gate, up and down projection there.
    """
    hf_layer, layer = "model.layers.{i}", "blocks.{i}"
    yield one("model.embed_tokens", "embed")
    yield one("model.norm", "norm")
    yield one(f"{hf_layer}.input_layernorm", f"{layer}.norm1")
    yield one(f"{hf_layer}.post_attention_layernorm", f"{layer}.norm2")
    yield from projections(config)
    layers = tuple(config.mixture_layers)
    yield one(f"{hf_layer}.{mlp}.gate", f"{layer}.mlp.router", layers=layers)
    for p, name in zip(PROJECTIONS, names or [f"{p}_proj" for p in PROJECTIONS], strict=True):
        yield one(f"{hf_layer}.{mlp}.experts.{{e}}.{name}", f"{layer}.mlp.experts.{p}_proj", layers=layers)
    if config.balance_bias:
        bias = f"{hf_layer}.{mlp}.gate.e_score_correction_bias"
        yield Weight(bias, (f"{layer}.mlp.balance_bias",), layers=layers)
    if config.n_shared_experts:
        for p in PROJECTIONS:
            yield one(f"{hf_layer}.{mlp}.shared_experts.{p}_proj", f"{layer}.mlp.shared.{p}_proj", layers=layers)
    yield from lm_head(config)


def _mixtral(config: ModelConfig) -> Iterator[Weight]:
    return _weights(config, mlp="block_sparse_moe", names=("w1", "w3", "w2"))


def _read_dense_layers(values: Values) -> dict[str, object]:
    """mlp_only_layers, a list of layers, must be the first ones: all that n_dense_layers states."""
    dense, step = set(values["mlp_only_layers"] or ()), values["decoder_sparse_step"]
    n = max(dense, default=-1) + 1
    if any(layer not in dense for layer in range(step - 1, n, step)):
        raise ConfigError(f"mlp_only_layers={sorted(dense)} is not supported: the first layers only")
    return {"n_dense_layers": n}


def _write_dense_layers(config: ModelConfig) -> dict[str, object]:
    return {"mlp_only_layers": list(range(config.n_dense_layers))}


def _read_head_dim(values: Values) -> dict[str, object]:
    """ConfigError for another head_dim than hidden_size / num_attention_heads: these classes have no such key."""
    derived = values["hidden_size"] // values["num_attention_heads"]
    if values.get("head_dim") not in (None, derived):
        raise ConfigError(f"head_dim={values['head_dim']!r} is not supported, only hidden_size / num_attention_heads")
    return {}


def _read_shared(values: Values) -> dict[str, object]:
    return {"n_shared_experts": values["n_shared_experts"] or 0}


def _write_shared(config: ModelConfig) -> dict[str, object]:
    if not config.n_shared_experts:
        raise ConfigError("dots1 needs model.n_shared_experts")
    return {"n_shared_experts": config.n_shared_experts}


DENSE_LAYERS = Codec(_read_dense_layers, _write_dense_layers, ("mlp_only_layers",))
DERIVED_HEAD_DIM = Codec(_read_head_dim, lambda config: {}, ("head_dim",))
SHARED = Codec(_read_shared, _write_shared, ("n_shared_experts",))
COMMON = {"experts_per_token": "num_experts_per_tok"}
WITHOUT_HEAD_DIM = {field: key for field, key in UNBIASED.fields.items() if field != "head_dim"}
DEFAULTS = {key: value for key, value in LLAMA.defaults.items() if key != "head_dim"}

MIXTRAL = replace(
    UNBIASED,
    model_type="mixtral",
    architectures={
        Head.linear: ("MixtralForCausalLM",),
        Head.score: ("MixtralForSequenceClassification",),
        Head.none: ("MixtralModel",),
    },
    fixed={**UNBIASED.fixed, "normalize_top_k": True, "router": Router.softmax},
    fields={
        **UNBIASED.fields,
        **COMMON,
        "window": "sliding_window",
        "n_experts": "num_local_experts",
        "expert_size": "intermediate_size",  # behind the MLP's, which no layer has
    },
    constants={},
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    weights=_mixtral,
    codecs=(ROPE, CAUSAL),
    synonyms=(("num_experts", "num_local_experts"),),
)
QWEN3_MOE = replace(
    UNBIASED,
    model_type="qwen3_moe",
    architectures={
        Head.linear: ("Qwen3MoeForCausalLM",),
        Head.score: ("Qwen3MoeForSequenceClassification",),
        Head.none: ("Qwen3MoeModel",),
    },
    fixed={**LLAMA.fixed, "qk_norm": True, "router": Router.softmax},
    fields={
        **UNBIASED.fields,
        **COMMON,
        "n_experts": "num_experts",
        "expert_size": "moe_intermediate_size",
        "expert_every": "decoder_sparse_step",
        "normalize_top_k": "norm_topk_prob",
    },
    constants={"use_sliding_window": False},
    defaults={
        **LLAMA.defaults,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
    weights=_weights,
    codecs=(ROPE, ATTENTION_BIAS, CAUSAL, FULL, DENSE_LAYERS),
    synonyms=(("num_local_experts", "num_experts"),),
)
OLMOE = replace(
    UNBIASED,
    model_type="olmoe",
    architectures={Head.linear: ("OlmoeForCausalLM",), Head.none: ("OlmoeModel",)},
    fixed={**LLAMA.fixed, "qk_norm": True, "qk_norm_joint": True, "router": Router.softmax},
    fields={
        **WITHOUT_HEAD_DIM,
        **COMMON,
        "n_experts": "num_experts",
        "expert_size": "intermediate_size",
        "normalize_top_k": "norm_topk_prob",
    },
    constants={"clip_qkv": None},
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    weights=_weights,
    codecs=(ROPE, ATTENTION_BIAS, CAUSAL, DERIVED_HEAD_DIM),
    synonyms=(("num_local_experts", "num_experts"),),
)
DOTS1 = Family(
    model_type="dots1",
    architectures={Head.linear: ("Dots1ForCausalLM",), Head.none: ("Dots1Model",)},
    # any step of the bias means that the file holds one
    fixed={**LLAMA.fixed, "qk_norm": True, "router": Router.sigmoid, "balance_bias": 0.001},
    fields={
        **WITHOUT_HEAD_DIM,
        **COMMON,
        "n_experts": "n_routed_experts",
        "expert_size": "moe_intermediate_size",
        "n_dense_layers": "first_k_dense_replace",
        "normalize_top_k": "norm_topk_prob",
        "router_scale": "routed_scaling_factor",
    },
    constants={"n_group": 1, "topk_group": 1},
    defaults={
        **DEFAULTS,
        "n_shared_experts": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    weights=_weights,
    codecs=(ROPE, ATTENTION_BIAS, CAUSAL, FULL, DERIVED_HEAD_DIM, SHARED),
    prefix="model.",
    ties=UNBIASED.ties,
    synonyms=(("num_local_experts", "n_routed_experts"),),
)
MIXTURES = [MIXTRAL, QWEN3_MOE, OLMOE, DOTS1]
