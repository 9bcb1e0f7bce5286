"""ModernBERT: an encoder with rotary positions, windows in two of three layers, GEGLU and no biases (Warner et al. 2024)."""

from collections.abc import Iterator

from genai_pl.config.enums import Head, NormOrder, Position, Shape
from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import ACTIVATIONS, Codec, Family, Values, Weight, both, one
from genai_pl.models.hf.families.rope import read_rope, write_rope

FULL, SLIDING = "full_attention", "sliding_attention"
THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}  # older keys, defaults


def _modernbert(config: ModelConfig) -> Iterator[Weight]:
    hf_layer, layer = "model.layers.{i}", "blocks.{i}"

    def linear(hf_name: str, *names: str, bias: bool, **layout: object) -> Iterator[Weight]:
        yield from both(hf_name, *names, **layout) if bias else (one(hf_name, *names, **layout),)

    def norm(hf_name: str, name: str, **layout: object) -> Iterator[Weight]:
        weight, bias = both(hf_name, name)
        yield from (row._replace(**layout) for row in ((weight, bias) if config.bias else (weight,)))

    yield one("model.embeddings.tok_embeddings", "embed")
    yield from norm("model.embeddings.norm", "embed_norm")
    yield from norm(f"{hf_layer}.attn_norm", f"{layer}.norm1", layers=tuple(range(1, config.n_layer)))
    qkv = (f"{layer}.attention.{p}_proj" for p in "qkv")
    yield from linear(f"{hf_layer}.attn.Wqkv", *qkv, bias=config.qkv_bias)
    yield from linear(f"{hf_layer}.attn.Wo", f"{layer}.attention.o_proj", bias=config.o_bias)
    yield from norm(f"{hf_layer}.mlp_norm", f"{layer}.norm2")
    yield from linear(f"{hf_layer}.mlp.Wi", f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj", bias=config.bias)
    yield from linear(f"{hf_layer}.mlp.Wo", f"{layer}.mlp.down_proj", bias=config.bias)
    yield from norm("model.final_norm", "norm")
    if config.head is Head.none:
        return
    yield from linear("head.dense", "transform.dense", bias=config.transform_bias)
    yield from norm("head.norm", "transform.norm")
    if config.head.scores:
        yield from both("classifier", "score")
        return
    yield Weight("decoder.bias", ("lm_head.bias",))
    if not config.tie_embeddings:
        yield one("decoder", "lm_head")


def _read_layers(values: Values) -> dict[str, object]:
    """Windows and bases. Layers are listed by kind or stated by a period from the first on; lists must have a period."""
    n, kinds, every = values["num_hidden_layers"], values.get("layer_types"), values["global_attn_every_n_layers"]
    if kinds is None:
        kinds = [SLIDING if i % every else FULL for i in range(n)]
    elif len(kinds) != n or not {*kinds} <= {FULL, SLIDING}:
        raise ConfigError(f"layer_types={kinds!r} must say {FULL} or {SLIDING} for each of {n} layers")
    half = values["local_attention"] // 2
    if values.get("sliding_window", half) != half:  # transformers would set the first by the second
        raise ConfigError(f"sliding_window={values['sliding_window']!r} is not half of local_attention ({half})")
    bases, scaling = {}, {}
    for kind, (older, default) in THETAS.items():
        theta = default if values.get(older) is None else values[older]
        rope = {**((values.get("rope_parameters") or {}).get(kind) or {}), **(values.get("rope_scaling") or {})}
        bases[kind], scaling[kind] = read_rope(rope, theta=theta, values=values)
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    if len(full) == n:
        return {"rope_theta": bases[FULL], "rope_scaling": scaling[FULL]}
    if scaling[SLIDING] != type(scaling[SLIDING])():
        raise ConfigError("scaled rotary positions in windowed layers are not supported")
    period, first = _period(full, n)
    if first >= period or full != list(range(first, n, period)):
        raise ConfigError(f"layer_types={kinds!r} without a period are not supported")
    return {
        "rope_theta": bases[FULL],
        "rope_scaling": scaling[FULL],
        "rope_theta_local": bases[SLIDING],
        "window": half + 1,  # to either side, the token itself included
        "full_every": period,
        "first_full": first,
    }


def _period(full: list[int], n: int) -> tuple[int, int]:
    """Period and first of the layers without a window; a period above n, with the first beyond them, where there are none."""
    if not full:
        return n + 1, n
    period = full[1] - full[0] if len(full) > 1 else max(n - full[0], full[0] + 1)
    return period, full[0]


def _write_layers(config: ModelConfig) -> dict[str, object]:
    """Both forms: transformers 4 reads period and bases, 5 the list and rope_parameters."""
    every, n = config.full_every, config.n_layer
    first = config.first_full if config.first_full is not None or every is None else every - 1
    full = range(n) if config.window is None else () if every is None else range(first, n, every)
    local = config.rope_theta if config.rope_theta_local is None else config.rope_theta_local
    entries = {
        FULL: write_rope(config.rope_theta, config.rope_scaling),
        SLIDING: {"rope_type": "default", "rope_theta": local},
    }
    older = {"global_attn_every_n_layers": every or n} if first == 0 or config.window is None else {}
    if config.window is None:
        older = {"global_attn_every_n_layers": 1}
    return {
        **older,
        "layer_types": [FULL if i in full else SLIDING for i in range(n)],
        "local_attention": 2 * ((config.window or 65) - 1),
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": local,
        "rope_parameters": entries,
    }


def _read_parts(values: Values) -> dict[str, object]:
    """Biases and the pooling of the classifier; ConfigError for combinations that our model does not have."""
    if values["mlp_bias"] != values["norm_bias"]:
        raise ConfigError(f"mlp_bias={values['mlp_bias']} with norm_bias={values['norm_bias']} is not supported")
    names = values["classifier_activation"], values["hidden_activation"]
    if ACTIVATIONS.get(names[0]) is not ACTIVATIONS.get(names[1]):
        raise ConfigError(f"classifier_activation={values['classifier_activation']!r} must be hidden_activation")
    if values["classifier_pooling"] not in ("cls", "mean"):
        raise ConfigError(f"classifier_pooling={values['classifier_pooling']!r} is not supported; supported: cls, mean")
    attention = values["attention_bias"]
    return {
        "bias": values["mlp_bias"],
        "qkv_bias": attention,
        "o_bias": attention,
        "transform_bias": values["classifier_bias"],
        "score_mean": values["classifier_pooling"] == "mean",
    }


def _write_parts(config: ModelConfig) -> dict[str, object]:
    if config.qkv_bias != config.o_bias:
        raise ConfigError("ModernBERT has one option for the biases of attention")
    return {
        "mlp_bias": config.bias,
        "norm_bias": config.bias,
        "attention_bias": config.qkv_bias,
        "classifier_bias": config.transform_bias,
        "classifier_activation": next(name for name, kind in ACTIVATIONS.items() if kind is config.activation),
        "classifier_pooling": "mean" if config.score_mean else "cls",
    }


LAYER_KEYS = (
    "layer_types",
    "local_attention",
    "global_attn_every_n_layers",
    "rope_parameters",
    "rope_scaling",
    "sliding_window",
)
PART_KEYS = (
    "mlp_bias",
    "norm_bias",
    "attention_bias",
    "classifier_bias",
    "classifier_pooling",
    "classifier_activation",
)
MODERNBERT = Family(
    model_type="modernbert",
    architectures={
        Head.transform: ("ModernBertForMaskedLM",),
        Head.none: ("ModernBertModel",),
        Head.score: ("ModernBertForSequenceClassification",),
        Head.tokens: ("ModernBertForTokenClassification",),
    },
    fixed={
        "shape": Shape.encoder,
        "norm_order": NormOrder.pre,
        "embed_norm": True,
        "first_norm": False,
        "position": Position.rotary,
        "gated_mlp": True,
        "score_transform": True,
    },
    fields={
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "norm_eps",
        "activation": "hidden_activation",
        "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range",
    },
    constants={"decoder_bias": True},
    defaults={
        "max_position_embeddings": 8192,
        "norm_eps": 1e-5,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "mlp_bias": False,
        "norm_bias": False,
        "attention_bias": False,
        "classifier_bias": False,
        "classifier_pooling": "cls",
    },
    weights=_modernbert,
    codecs=(
        Codec(_read_layers, _write_layers, (*LAYER_KEYS, *(older for older, _ in THETAS.values()))),
        Codec(_read_parts, _write_parts, PART_KEYS),
    ),
    dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"),
    prefix="model.",
    head_bias=True,
    score_transform=True,
    head_tensor="head.dense.weight",
    ties=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
)
