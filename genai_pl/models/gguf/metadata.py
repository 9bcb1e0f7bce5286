"""Metadata of GGUF: a configuration as llama.cpp's keys, and keys as a configuration."""

from collections.abc import Container, Mapping

from genai_pl.config.enums import Norm, Router
from genai_pl.config.model import ModelConfig
from genai_pl.errors import CheckpointError
from genai_pl.models.gguf.architectures import ARCHITECTURES, GEMMA_27B, Architecture
from genai_pl.models.gguf.rope import read_scaling, write_scaling
from genai_pl.models.hf.families import FAMILIES, Family

Keys = dict[str, object]
NAME = "general.architecture"
SIZES = {  # field of ModelConfig -> key below the architecture's name
    "n_layer": "block_count",
    "n_embd": "embedding_length",
    "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
}
EPS = {Norm.layernorm: "attention.layer_norm_epsilon", Norm.rmsnorm: "attention.layer_norm_rms_epsilon"}
CONTEXT, THETA, THETA_LOCAL = "context_length", "rope.freq_base", "rope.freq_base_swa"
KEY_SIZE, VALUE_SIZE, ROTATED = "attention.key_length", "attention.value_length", "rope.dimension_count"
WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
EXPERTS = {"n_experts": "expert_count", "experts_per_token": "expert_used_count"}
MIXTURE = {  # further fields of dots1, whose graph reads them
    "n_shared_experts": "expert_shared_count",
    "n_dense_layers": "leading_dense_block_count",
    "router_scale": "expert_weights_scale",
    "normalize_top_k": "expert_weights_norm",
}
GATING, SIGMOID = "expert_gating_func", 2
# llama.cpp's values where a file has no key
PERIODS = {"gemma3": 6, "gpt-oss": 2}


def write_metadata(config: ModelConfig, architecture: Architecture) -> Keys:
    """All keys of a configuration, the names of tensors and tokens apart."""
    keys = {key: getattr(config, field) for field, key in SIZES.items()}
    keys |= {EPS[config.norm]: config.norm_eps, CONTEXT: context_length(config, architecture)}
    keys["vocab_size"] = config.vocab_size
    # positions and windows
    if architecture.name != "gpt2":
        keys |= dict.fromkeys((KEY_SIZE, VALUE_SIZE, ROTATED), config.head_dim)
        keys |= {THETA: float(config.rope_theta), **write_scaling(config.rope_scaling)}
    if architecture.windows:
        keys[WINDOW] = config.window or config.max_seq_len
        # a period above the number of layers means that all have a window; 1 that none has
        keys[PATTERN] = 1 if config.window is None else config.full_every or config.n_layer + 1
        local = config.rope_theta if config.rope_theta_local is None else config.rope_theta_local
        keys[THETA_LOCAL] = float(local)
    # experts
    if config.n_experts:
        keys |= {key: getattr(config, field) for field, key in EXPERTS.items()}
        keys[architecture.expert_key] = config.expert_size
    if architecture.name == "dots1":
        keys |= {key: getattr(config, field) for field, key in MIXTURE.items()}
        keys[GATING] = SIGMOID
    return {NAME: architecture.name, **{f"{architecture.name}.{key}": value for key, value in keys.items()}}


def context_length(config: ModelConfig, architecture: Architecture) -> int:
    """Tokens up to which llama.cpp computes this model: no more than a window, where the architecture has none."""
    if config.window is None or architecture.windows:
        return config.max_seq_len
    return min(config.max_seq_len, config.window)


def read_metadata(keys: Keys, tensors: Container[str], factors: object = None) -> tuple[ModelConfig, Architecture]:
    """The configuration of a file and its architecture; CheckpointError for what our model does not compute.

    tensors: names of those in the file, which decide about biases. factors: the tensor `rope_freqs.weight`, or None.
    """
    name = keys.get(NAME)
    own = {key.removeprefix(f"{name}."): _rounded(value) for key, value in keys.items() if key.startswith(f"{name}.")}
    kinds = [architecture for architecture in ARCHITECTURES if architecture.name == name]
    if not kinds:
        known = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
        raise CheckpointError(f"architecture {name!r} is not supported; supported: {known}")
    mixtral = name == "llama" and bool(own.get("expert_count"))
    architecture = next(kind for kind in kinds if not mixtral or kind.family == "mixtral")
    family = next(family for family in FAMILIES if family.model_type == architecture.family)
    fields = _read_fields(own, architecture, family, tensors)
    if architecture.name != "gpt2":
        head_dim = fields["head_dim"]
        scaling = read_scaling(own, factors, head_dim=head_dim, theta=fields["rope_theta"])
        fields["rope_scaling"] = scaling
    fixed = {**family.fixed, **architecture.fixed}
    return ModelConfig(**{**fixed, **fields}, extra={"model_type": family.model_type}), architecture


def _read_fields(own: Keys, architecture: Architecture, family: Family, tensors: Container[str]) -> dict[str, object]:
    """Fields of ModelConfig from the keys of the architecture, and from which tensors there are."""
    fields = {field: own[key] for field, key in SIZES.items() if key in own or field != "n_kv_head"}
    fields |= {"vocab_size": own["vocab_size"], "max_seq_len": own[CONTEXT]}
    norm = family.fixed.get("norm", Norm.layernorm)
    fields["norm_eps"] = own[EPS[norm]]
    fields["tie_embeddings"] = "output.weight" not in tensors
    if architecture.name == "gemma3" and own["block_count"] == GEMMA_27B:
        fields["attention_scale"] = (own["embedding_length"] / own["attention.head_count"]) ** -0.5
    if architecture.name == "gpt2":
        return fields
    # positions and windows
    head_dim = own.get(KEY_SIZE, own["embedding_length"] // own["attention.head_count"])
    for key in (VALUE_SIZE, ROTATED):
        if own.get(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{architecture.name}.{key}={own[key]} is not supported, only {head_dim}, as {KEY_SIZE}"
            )
    fields |= {"head_dim": head_dim, "rope_theta": own.get(THETA, 10000.0)}
    if architecture.windows:
        fields |= _read_windows(own, architecture.name)
    # biases, experts
    fields |= {"qkv_bias": "blk.0.attn_q.bias" in tensors, "o_bias": "blk.0.attn_output.bias" in tensors}
    if own.get("expert_count"):
        fields |= {field: own[key] for field, key in EXPERTS.items()}
        fields["expert_size"] = own.get(architecture.expert_key, fields["intermediate_size"])
    if architecture.name == "dots1":
        fields |= {field: own[key] for field, key in MIXTURE.items() if key in own}
        fields |= {"router": Router.sigmoid}
    return fields


def _read_windows(own: Mapping[str, object], name: str) -> dict[str, object]:
    """Window, period of full layers, and the base of windowed layers."""
    period = own.get(PATTERN, PERIODS[name])
    if not isinstance(period, int):
        raise CheckpointError(f"{name}.{PATTERN} is a list, which is not supported; supported: a period")
    if period == 1 or WINDOW not in own:
        return {"window": None}
    fields = {"window": own[WINDOW], "full_every": period}
    base = own.get(THETA_LOCAL, 10000.0 if name == "gemma3" else own.get(THETA, 10000.0))
    return fields if name == "gpt-oss" and base == own.get(THETA) else {**fields, "rope_theta_local": base}


def _rounded(value: object) -> object:
    """A number as it was before it was stored in float32."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
