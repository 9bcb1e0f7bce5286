"""Encoders with learned positions: BERT, RoBERTa, ALBERT.

Their layers are equal; names of tensors, the head's names and a few keys differ. ALBERT stores one layer for all.
"""

from collections.abc import Iterator
from dataclasses import replace

from genai_pl.config.enums import Head, NormOrder, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import Codec, Family, Values, Weight, both, one


def _embeddings(prefix: str) -> Iterator[Weight]:
    yield one(f"{prefix}.embeddings.word_embeddings", "embed")
    yield one(f"{prefix}.embeddings.position_embeddings", "position")
    yield one(f"{prefix}.embeddings.token_type_embeddings", "types")
    yield from both(f"{prefix}.embeddings.LayerNorm", "embed_norm")


def _layers(prefix: str) -> Iterator[Weight]:
    hf_layer, layer = f"{prefix}.encoder.layer.{{i}}", "blocks.{i}"
    for name, p in (("query", "q"), ("key", "k"), ("value", "v")):
        yield from both(f"{hf_layer}.attention.self.{name}", f"{layer}.attention.{p}_proj")
    yield from both(f"{hf_layer}.attention.output.dense", f"{layer}.attention.o_proj")
    yield from both(f"{hf_layer}.attention.output.LayerNorm", f"{layer}.norm1")
    yield from both(f"{hf_layer}.intermediate.dense", f"{layer}.mlp.up_proj")
    yield from both(f"{hf_layer}.output.dense", f"{layer}.mlp.down_proj")
    yield from both(f"{hf_layer}.output.LayerNorm", f"{layer}.norm2")


def _label_head(config: ModelConfig, dense: str, score: str) -> Iterator[Weight]:
    """The rows of a head for labels: of texts behind a dense layer, of tokens alone."""
    if config.head is Head.score:
        yield from both(dense, "score_dense")
        yield from both(score, "score")
    elif config.head is Head.tokens:
        yield from both("classifier", "score")


def _head(config: ModelConfig, dense: str, norm: str, decoder: str, bias: str) -> Iterator[Weight]:
    if not config.head.predicts_tokens:
        return
    yield from both(dense, "transform.dense")
    yield from both(norm, "transform.norm")
    yield Weight(bias, ("lm_head.bias",))
    if not config.tie_embeddings:
        yield one(decoder, "lm_head")
        yield Weight(f"{decoder}.bias", ("lm_head.bias",))  # the one that is added if the head is not tied


def _bert(config: ModelConfig) -> Iterator[Weight]:
    at = "cls.predictions"
    yield from _embeddings("bert")
    yield from _layers("bert")
    yield from _head(config, f"{at}.transform.dense", f"{at}.transform.LayerNorm", f"{at}.decoder", f"{at}.bias")
    yield from _label_head(config, "bert.pooler.dense", "classifier")


def _roberta(config: ModelConfig) -> Iterator[Weight]:
    yield from _embeddings("roberta")
    yield from _layers("roberta")
    yield from _head(config, "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
    yield from _label_head(config, "classifier.dense", "classifier.out_proj")


def _albert(config: ModelConfig) -> Iterator[Weight]:
    hf_layer, layer = "albert.encoder.albert_layer_groups.0.albert_layers.0", "blocks.0"
    yield from _embeddings("albert")
    yield from both("albert.encoder.embedding_hidden_mapping_in", "embed_proj")
    for name, p in (("query", "q"), ("key", "k"), ("value", "v"), ("dense", "o")):
        yield from both(f"{hf_layer}.attention.{name}", f"{layer}.attention.{p}_proj")
    yield from both(f"{hf_layer}.attention.LayerNorm", f"{layer}.norm1")
    yield from both(f"{hf_layer}.ffn", f"{layer}.mlp.up_proj")
    yield from both(f"{hf_layer}.ffn_output", f"{layer}.mlp.down_proj")
    yield from both(f"{hf_layer}.full_layer_layer_norm", f"{layer}.norm2")
    yield from _head(config, "predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias")
    yield from _label_head(config, "albert.pooler", "classifier")


def _ties(prefix: str, decoder: str, bias: str) -> tuple[tuple[str, str], ...]:
    embedding = f"{prefix}.embeddings.word_embeddings.weight"
    return (f"{decoder}.weight", embedding), (f"{decoder}.bias", bias)


def _read_roberta(values: Values) -> dict[str, object]:
    """RoBERTa numbers positions from pad_token_id + 1 on, so its table has as many more rows."""
    if type(values["pad_token_id"]) is not int:
        raise ConfigError(f"pad_token_id={values['pad_token_id']!r} must be a number: positions begin after it")
    offset = values["pad_token_id"] + 1
    return {"position_offset": offset, "max_seq_len": values["max_position_embeddings"] - offset}


def _write_roberta(config: ModelConfig) -> dict[str, object]:
    offset = config.position_offset
    return {"max_position_embeddings": config.max_seq_len + offset, "pad_token_id": offset - 1}


def _check(values: Values) -> dict[str, object]:
    """ConfigError for an encoder with a causal mask, and for one without token types."""
    if values.get(
        "is_causal"
    ):  # transformers 5 hides what follows with its sdpa attention, and does not with its eager one
        raise ConfigError(f"is_causal={values['is_causal']!r} is not supported for an encoder")
    if not values["type_vocab_size"]:
        raise ConfigError("type_vocab_size=0 is not supported: each token is of a type")
    return {}


def _check_albert(values: Values) -> dict[str, object]:
    """ConfigError for embeddings as wide as blocks: ALBERT projects them all the same, and our model does not."""
    if values["embedding_size"] == values["hidden_size"]:
        raise ConfigError("embedding_size equal to hidden_size is not supported for model_type 'albert'")
    return {}


def _classes(name: str) -> dict[Head, tuple[str, ...]]:
    """transformers' classes of a family by their heads."""
    return {
        Head.transform: (f"{name}ForMaskedLM", f"{name}ForPreTraining"),
        Head.none: (f"{name}Model",),
        Head.score: (f"{name}ForSequenceClassification",),
        Head.tokens: (f"{name}ForTokenClassification",),
    }


CHECK = Codec(_check, lambda config: {}, ("is_causal",))
BERT = Family(
    model_type="bert",
    architectures=_classes("Bert"),
    fixed={
        "shape": Shape.encoder,
        "norm_order": NormOrder.post,
        "embed_norm": True,
    },
    fields={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "n_token_types": "type_vocab_size",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    constants={
        "is_decoder": False,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
    defaults={
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
    },
    weights=_bert,
    codecs=(CHECK,),
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    prefix="bert.",
    head_bias=True,
    score_bias=True,
    head_tensor="cls.predictions.transform.dense.weight",
    pooler="bert.pooler.dense",
    ties=_ties("bert", "cls.predictions.decoder", "cls.predictions.bias"),
)
ROBERTA = replace(
    BERT,
    model_type="roberta",
    architectures={**_classes("Roberta"), Head.transform: ("RobertaForMaskedLM",)},
    fields={k: v for k, v in BERT.fields.items() if k != "max_seq_len"},
    constants={**BERT.constants, "hidden_act": "gelu"},  # which its head has whatever the key says
    defaults={**BERT.defaults, "pad_token_id": 1},
    weights=_roberta,
    codecs=(CHECK, Codec(_read_roberta, _write_roberta, ("max_position_embeddings", "pad_token_id"))),
    prefix="roberta.",
    head_tensor="lm_head.dense.weight",
    pooler="roberta.pooler.dense",
    ties=_ties("roberta", "lm_head.decoder", "lm_head.bias"),
)
ALBERT = replace(
    BERT,
    model_type="albert",
    architectures=_classes("Albert"),
    fixed={**BERT.fixed, "share_layers": True},
    fields={**BERT.fields, "embedding_size": "embedding_size"},
    constants={"num_hidden_groups": 1, "inner_group_num": 1, "position_embedding_type": "absolute"},
    codecs=(CHECK, Codec(_check_albert, lambda config: {}, ())),
    defaults={**BERT.defaults, "embedding_size": 128, "hidden_act": "gelu_new"},
    weights=_albert,
    prefix="albert.",
    head_tensor="predictions.dense.weight",
    pooler="albert.pooler",
    ties=_ties("albert", "predictions.decoder", "predictions.bias"),
)
