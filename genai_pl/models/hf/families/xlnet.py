"""XLNet: an encoder with Transformer-XL positions, and a second stream for permutation language modelling.

Its projections are stored as (C, heads, head_dim); ours are (heads * head_dim, C).
"""

from collections.abc import Iterator

from genai_pl.config.enums import Head, NormOrder, Position, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import Codec, Family, Values, Weight, both, one


def _xlnet(config: ModelConfig) -> Iterator[Weight]:
    hf_layer, layer = "transformer.layer.{i}", "blocks.{i}"
    heads = {"head_dim": config.head_dim}
    # embeddings, attention with its relative positions, MLP, head
    yield one("transformer.word_embedding", "embed")
    yield Weight("transformer.mask_emb", ("unseen",), leading=2)
    for p in "qkv":
        yield Weight(f"{hf_layer}.rel_attn.{p}", (f"{layer}.attention.{p}_proj.weight",), transposed=True, **heads)
    yield Weight(f"{hf_layer}.rel_attn.o", (f"{layer}.attention.o_proj.weight",), **heads)
    yield Weight(f"{hf_layer}.rel_attn.r", (f"{layer}.attention.xl.r_proj.weight",), transposed=True, **heads)
    for name, bias in (("r_w_bias", "content_bias"), ("r_r_bias", "position_bias"), ("r_s_bias", "type_bias")):
        yield Weight(f"{hf_layer}.rel_attn.{name}", (f"{layer}.attention.xl.{bias}",))
    yield Weight(f"{hf_layer}.rel_attn.seg_embed", (f"{layer}.attention.xl.type_embed",))
    yield from both(f"{hf_layer}.rel_attn.layer_norm", f"{layer}.norm1")
    yield from both(f"{hf_layer}.ff.layer_1", f"{layer}.mlp.up_proj")
    yield from both(f"{hf_layer}.ff.layer_2", f"{layer}.mlp.down_proj")
    yield from both(f"{hf_layer}.ff.layer_norm", f"{layer}.norm2")
    if config.head is not Head.none:
        yield Weight("lm_loss.bias", ("lm_head.bias",))
        if not config.tie_embeddings:
            yield one("lm_loss", "lm_head")


def _check_heads(values: Values) -> dict[str, object]:
    """ConfigError where heads do not fill d_model."""
    if (values.get("d_head") or values["d_model"] // values["n_head"]) * values["n_head"] != values["d_model"]:
        raise ConfigError("d_head times n_head must be d_model")
    if "max_position_embeddings" in values:
        raise ConfigError("max_position_embeddings is a key that XLNet has not")
    return {}


XLNET = Family(
    model_type="xlnet",
    architectures={Head.linear: ("XLNetLMHeadModel",), Head.none: ("XLNetModel",)},
    fixed={
        "shape": Shape.encoder,
        "position": Position.xl,
        "norm_order": NormOrder.post,
        "qkv_bias": False,
        "o_bias": False,
    },
    fields={
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "d_model",
        "intermediate_size": "d_inner",
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",  # ours alone: XLNet has no longest text
        "norm_eps": "layer_norm_eps",
        "activation": "ff_activation",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    constants={"attn_type": "bi", "bi_data": False, "clamp_len": -1, "same_length": False},
    defaults={
        "n_positions": 512,
        "layer_norm_eps": 1e-12,
        "ff_activation": "gelu",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    weights=_xlnet,
    codecs=(Codec(_check_heads, lambda config: {}, ("d_head", "max_position_embeddings")),),
    dropouts=("dropout",),
    prefix="transformer.",
    head_bias=True,
    head_tensor="lm_loss.bias",
    ties=(("lm_loss.weight", "transformer.word_embedding.weight"),),
    synonyms=(
        ("n_token", "vocab_size"),
        ("hidden_size", "d_model"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
    ),
)
