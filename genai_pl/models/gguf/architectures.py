"""Architectures of llama.cpp: which family each computes, what it takes for granted, and its names of tensors.

The facts are those of llama.cpp's graphs (github.com/ggml-org/llama.cpp, src/models) and of the package `gguf`
(`get_tensor_name_map`). A configuration that a graph would compute otherwise is refused, since llama.cpp reads only
the metadata that it knows and ignores the rest.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from genai_pl.config.enums import Activation, Head, RopeKind, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.config import family_of, native_table
from genai_pl.models.hf.families import Weight

NAMES = {  # ours, below blocks.{i} or at the top -> llama.cpp's
    "embed": "token_embd",
    "position": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "norm1": "attn_norm",
    "norm2": "ffn_norm",
    **{f"attention.{p}_proj": f"attn_{p}" for p in "qkv"},
    "attention.o_proj": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    **{f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")},
    **{f"mlp.experts.{p}_proj": f"ffn_{p}_exps" for p in ("gate", "up", "down")},
    **{f"mlp.shared.{p}_proj": f"ffn_{p}_shexp" for p in ("gate", "up", "down")},
    "mlp.router": "ffn_gate_inp",
}
BARE = {"attention.sinks": "attn_sinks.weight", "mlp.balance_bias": "exp_probs_b.bias"}  # ours have no .weight
SCALINGS = (RopeKind.none, RopeKind.linear, RopeKind.yarn)


class Architecture(NamedTuple):
    """One architecture of llama.cpp as it computes one of our families.

    name        general.architecture
    family      model_type of the family that it computes
    fixed       fields of ModelConfig that its graph does not read: they must have this value
    scalings    of rotary positions that it computes
    names       of tensors that it has otherwise than `NAMES`
    paired      queries and keys are stored by rotary pairs, the two halves of a head interleaved
    windows     it has layers with a window
    own_head    output.weight is needed also where it is the embedding
    fused_qkv   attn_qkv holds the three projections
    grouped     it has fewer heads of keys than of queries
    expert_key  the key of an expert's hidden channels
    """

    name: str
    family: str
    fixed: Mapping[str, object] = {"activation": Activation.silu}
    scalings: tuple[RopeKind, ...] = SCALINGS
    names: Mapping[str, str] = {}
    paired: bool = False
    windows: bool = False
    own_head: bool = False
    fused_qkv: bool = False
    grouped: bool = True
    expert_key: str = "expert_feed_forward_length"

    def refuse(self, config: ModelConfig) -> None:
        """ConfigError for a field whose value this architecture does not compute."""
        for field, needed in self.fixed.items():
            value = getattr(config, field)
            if value != needed:
                shown = [getattr(x, "value", x) for x in (value, needed)]
                raise ConfigError(
                    f"format=gguf: llama.cpp's {self.name} has no model.{field}={shown[0]}, only {shown[1]}; "
                    "format=hf or onnx writes this model"
                )
        if config.n_kv_head != config.n_head and not self.grouped:
            raise ConfigError(
                f"format=gguf: llama.cpp's {self.name} has no grouped heads, and this model has model.n_kv_head="
                f"{config.n_kv_head} of {config.n_head}; format=hf or onnx writes this model"
            )
        kind = config.rope_scaling.kind
        if kind not in self.scalings:
            known = ", ".join(scaling.value for scaling in self.scalings)
            raise ConfigError(
                f"format=gguf: llama.cpp's {self.name} has no rotary scaling {kind.value}, only {known}; "
                "format=hf or onnx writes this model"
            )

    def table(self, config: ModelConfig) -> Iterator[Weight]:
        """One row for each tensor of the file, as `Family.rows` has them for folders."""
        heads = {"q": config.n_head, "k": config.n_kv_head} if self.paired else {}
        for (name,) in (row.names for row in native_table(config)):
            projection = re.search(r"\.([qkv])_proj\.", name)
            if not (projection and self.fused_qkv):
                pair_heads = heads.get(projection[1]) if projection else None
                yield Weight(self.tensor_name(name), (name,), pair_heads=pair_heads)
        if self.fused_qkv:
            for i in range(config.n_layer):
                for kind in ("weight", "bias"):
                    ours = tuple(f"blocks.{i}.attention.{p}_proj.{kind}" for p in "qkv")
                    yield Weight(f"blk.{i}.attn_qkv.{kind}", ours)
        if self.own_head and config.tie_embeddings:
            yield Weight("output.weight", ("embed.weight",))

    def tensor_name(self, name: str) -> str:
        """llama.cpp's name of a tensor of ours; KeyError for one that it has no place for."""
        layer, inner = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", name).groups()
        stem, _, kind = inner.rpartition(".")
        found = BARE[inner] if inner in BARE else f"{({**NAMES, **self.names})[stem]}.{kind}"
        return found if layer is None else f"blk.{layer}.{found}"


GEMMA_27B = 62  # layers by which llama.cpp knows Gemma 3 27B, and gives it another scale of attention
UNBIASED = {"activation": Activation.silu, "qkv_bias": False, "o_bias": False}
ARCHITECTURES = (
    Architecture(
        "gpt2",
        "gpt2",
        {"activation": Activation.gelu_tanh},
        scalings=(RopeKind.none,),
        fused_qkv=True,
        grouped=False,
    ),
    *(Architecture("llama", family, scalings=tuple(RopeKind), paired=True) for family in ("llama", "mistral", "ministral")),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3", UNBIASED),
    Architecture(
        "gemma3",
        "gemma3_text",
        {**UNBIASED, "activation": Activation.gelu_tanh, "logit_softcap": None},
        scalings=(RopeKind.none, RopeKind.linear),
        names={"norm1_after": "post_attention_norm", "norm2_after": "post_ffw_norm"},
        windows=True,
    ),
    Architecture(
        "llama", "mixtral", scalings=tuple(RopeKind), paired=True, expert_key="feed_forward_length"
    ),
    Architecture(
        "qwen3moe", "qwen3_moe", {**UNBIASED, "normalize_top_k": True, "expert_every": 1, "n_dense_layers": 0}
    ),
    Architecture(
        "olmoe",
        "olmoe",
        {**UNBIASED, "normalize_top_k": False},
        own_head=True, grouped=False,
        expert_key="feed_forward_length",
    ),
    Architecture("dots1", "dots1", UNBIASED, own_head=True, grouped=False),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        {"qkv_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        names={"norm2": "post_attention_norm"},
        windows=True,
        own_head=True,
    ),
)  # fmt: skip


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that computes this configuration; ConfigError for a model that llama.cpp has none for."""
    if config.shape is not Shape.decoder or config.head is not Head.linear:
        what = f"{config.shape.value}, head={config.head.value}"
        raise ConfigError(f"format=gguf writes decoders with a language-model head, not this {what}; format=onnx does")
    family = family_of(config)
    kind = family.model_type if family else None
    found = next((architecture for architecture in ARCHITECTURES if architecture.family == kind), None)
    if found is None:
        known = ", ".join(dict.fromkeys(architecture.family for architecture in ARCHITECTURES))
        what = f"of type {kind}" if kind else "that no class of transformers has"
        raise ConfigError(f"format=gguf: llama.cpp has no model {what}; it has {known} (format=onnx writes this one)")
    found.refuse(config)
    if found.name == "gemma3":
        _refuse_scale(config)
    return found


def _refuse_scale(config: ModelConfig) -> None:
    """ConfigError for another scale of attention than llama.cpp's gemma3 has, of which the model of 27B has its own."""
    own = config.n_embd / config.n_head if config.n_layer == GEMMA_27B else config.head_dim
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    if abs(scale - own**-0.5) > 1e-6:
        raise ConfigError(
            f"format=gguf: llama.cpp's gemma3 has no model.attention_scale={scale:g}, only {own**-0.5:g}; "
            "format=hf or onnx writes this model"
        )
