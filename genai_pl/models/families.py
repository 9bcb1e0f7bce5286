"""How families of Hugging Face models are written in our terms: tables, read in both directions."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from genai_pl.specs import Activation, ModelConfig, Norm, NormOrder, Position, Shape


class Weight(NamedTuple):
    """One tensor of theirs and the tensors of ours that it holds, joined along the output dimension."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # theirs is (in, out)


@dataclass(frozen=True)
class Family:
    """A model family: what must hold, which field is called what, and where each tensor lies ({i} is the layer)."""

    model_type: str
    architecture: str  # the class of transformers
    fixed: dict[str, object]  # fields of ModelConfig that have this value in every member
    fields: dict[str, str]  # field of ModelConfig -> key of config.json
    constants: dict[str, object]  # further keys that must have this value, which is also transformers' default
    defaults: dict[str, object]  # what transformers assumes for `fields` where config.json is silent
    weights: tuple[Weight, ...]
    dropouts: tuple[str, ...] = ()  # keys that are written, and do not matter when reading

    def table(self, config: ModelConfig) -> list[Weight]:
        """Every tensor of a model of this configuration, layers written out."""
        head = () if config.tie_embeddings else (Weight("lm_head.weight", ("lm_head.weight",)),)
        return [
            Weight(row.theirs.format(i=i), tuple(name.format(i=i) for name in row.ours), row.transposed)
            for row in self.weights + head
            for i in (range(config.n_layer) if "{i}" in row.theirs else (0,))
        ]


def _both(theirs: str, *ours: str, transposed: bool = False) -> tuple[Weight, Weight]:
    """A linear layer or norm: its weight and its bias."""
    weight = Weight(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), transposed)
    return weight, Weight(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))


ACTIVATIONS = {
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu": Activation.gelu,
    "silu": Activation.silu,
    "relu": Activation.relu,
    "relu2": Activation.relu2,
}

_COMMON = {
    "shape": Shape.decoder,
    "norm_order": NormOrder.pre,
    "qk_norm": False,
    "window": None,
    "softcap": None,
    "logit_softcap": None,
}

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fixed={
        **_COMMON,
        "position": Position.learned,
        "norm": Norm.layernorm,
        "gated_mlp": False,
        "bias": True,
        "qkv_bias": True,
    },
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
    weights=(
        Weight("transformer.wte.weight", ("embed.weight",)),
        Weight("transformer.wpe.weight", ("position.weight",)),
        *_both("transformer.h.{i}.ln_1", "blocks.{i}.norm1"),
        *_both(
            "transformer.h.{i}.attn.c_attn",
            *(f"blocks.{{i}}.attention.{p}_proj" for p in "qkv"),
            transposed=True,
        ),
        *_both("transformer.h.{i}.attn.c_proj", "blocks.{i}.attention.o_proj", transposed=True),
        *_both("transformer.h.{i}.ln_2", "blocks.{i}.norm2"),
        *_both("transformer.h.{i}.mlp.c_fc", "blocks.{i}.mlp.up_proj", transposed=True),
        *_both("transformer.h.{i}.mlp.c_proj", "blocks.{i}.mlp.down_proj", transposed=True),
        *_both("transformer.ln_f", "norm"),
    ),
    dropouts=("attn_pdrop", "embd_pdrop", "resid_pdrop"),
)

_LLAMA_NAMES = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "model.layers.{i}.input_layernorm": "blocks.{i}.norm1",
    "model.layers.{i}.post_attention_layernorm": "blocks.{i}.norm2",
    **{f"model.layers.{{i}}.self_attn.{p}_proj": f"blocks.{{i}}.attention.{p}_proj" for p in "qkvo"},
    **{f"model.layers.{{i}}.mlp.{p}_proj": f"blocks.{{i}}.mlp.{p}_proj" for p in ("gate", "up", "down")},
}
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fixed={
        **_COMMON,
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
        "rope_theta": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "activation": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    constants={"attention_bias": False, "mlp_bias": False},
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    weights=tuple(Weight(f"{theirs}.weight", (f"{ours}.weight",)) for theirs, ours in _LLAMA_NAMES.items()),
)


def _in_attention(*names: str) -> tuple[Weight, ...]:
    """Tensors of every layer's attention that have the same name on both sides."""
    return tuple(Weight(f"model.layers.{{i}}.self_attn.{n}", (f"blocks.{{i}}.attention.{n}",)) for n in names)


MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fixed={k: v for k, v in LLAMA.fixed.items() if k != "window"},
    fields={**LLAMA.fields, "window": "sliding_window"},
    constants={},
    defaults={**LLAMA.defaults, "num_key_value_heads": 8, "sliding_window": 4096},
)
QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={**LLAMA.fixed, "qkv_bias": True},
    constants={"use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32},
    weights=LLAMA.weights + _in_attention("q_proj.bias", "k_proj.bias", "v_proj.bias"),
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={**LLAMA.fixed, "qk_norm": True},
    constants={"attention_bias": False, "use_sliding_window": False},
    defaults={**LLAMA.defaults, "num_key_value_heads": 32, "head_dim": 128},
    weights=LLAMA.weights + _in_attention("q_norm.weight", "k_norm.weight"),
)

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)
