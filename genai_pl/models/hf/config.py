"""config.json of a Hugging Face folder, in both directions.

Reading: the family of `model_type` maps keys to fields of `ModelConfig`, and refuses what our model does not compute.
Writing: the first family that can state the configuration exactly is chosen by trying: its config.json must read back as
a configuration with the same arithmetic. A model that no family can state gets model_type `genai_pl`, which transformers
does not know.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from genai_pl.config.enums import Activation, AttentionBackend, Head, RopeKind, Shape
from genai_pl.config.labels import read_labels
from genai_pl.config.model import EXPERT_FIELDS, ModelConfig
from genai_pl.config.values import MAX_LAYERS
from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.build import build_model
from genai_pl.models.hf.families import ACTIVATIONS, FAMILIES, Family, Weight
from genai_pl.models.hf.families.ministral import kind_of
from genai_pl.models.hf.folder import TensorFiles, read_json
from genai_pl.models.hf.quantized import check_quantization
from genai_pl.models.hf.ties import resolve_ties

# keys that `extra` does not keep: writing sets its own, and code beside the weights is not written
WRITTEN = (
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "eos_token_id",
    "quantization_config",
)  # fmt: skip
ONE_LABEL = {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}, "problem_type": "regression"}
NATIVE = "genai_pl"  # model_type of a folder that no class of transformers can express


def read_config(file: Path, stored: TensorFiles | None = None) -> tuple[ModelConfig, Iterable[Weight]]:
    """The configuration that a config.json describes, and its table of weights; CheckpointError if it is not supported.

    stored: the tensors beside it, which decide about ties, poolers and heads where config.json is silent or wrong; without
    them config.json alone counts. Nothing is built before all this agrees: a foreign file may state a million layers.
    """
    values = read_json(file)
    try:
        return _from_any(values, stored)
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing") from None
    except (ConfigError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # of values of any type
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}{_advice(values, error, file)}") from None


def _advice(values: Mapping[str, object], error: Exception, file: Path) -> str:
    """The other way to run a decoder of a family that has something ours does not compute."""
    kinds = {family.model_type for family in FAMILIES if family.fixed.get("shape", Shape.decoder) is Shape.decoder}
    if values.get("model_type") not in kinds or not isinstance(error, ConfigError) or "not supported" not in str(error):
        return ""
    return f"; try transformers' layers: model=hf model.name={file.parent}"


def prefix_of(file: Path) -> str:
    """The prefix of tensor names in models with a head, of the family of a config.json; empty for other families."""
    kind = read_json(file).get("model_type")
    return next((family.prefix for family in FAMILIES if family.model_type == kind), "")


def is_supported(file: Path) -> bool:
    """True if a config.json is of a family that our own models can be."""
    return read_json(file).get("model_type") in {NATIVE, *(family.model_type for family in FAMILIES)}


def write_config(
    config: ModelConfig, token_ids: Mapping[str, int | None]
) -> tuple[dict[str, object], list[Weight], str]:
    """The content of config.json, the table of weights to write, and the name of the class that reads both.

    token_ids: bos_token_id, eos_token_id, pad_token_id of the tokenizer; where one is None, that of the folder that the
    model was read from stays.
    """
    family = family_of(config)
    given = {key: n for key, n in token_ids.items() if n is not None}
    if family is not None:
        values = _to_family(family, config)
        # an id that means more than a token must not be overwritten: RoBERTa counts positions from its pad token
        if all(values[key] == n for key, n in given.items() if key in family.keys):
            if config.shape is Shape.encoder_decoder:
                values = {"decoder_start_token_id": given.get("pad_token_id", 0), **values}
            return {**token_ids, **values, **given}, family.table(config), family.architectures[config.head][0]
    values = {"model_type": NATIVE, "architectures": [type(_shell(config)).__name__], "model": config.to_dict()}
    return {**values, **token_ids}, native_table(config), NATIVE


def generation_values(values: Mapping[str, object], token_ids: Mapping[str, int | None]) -> dict[str, object]:
    """The content of generation_config.json beside a config.json of these values: the tokens that begin and end a text."""
    tokens = {key: values.get(key) for key in (*token_ids, "decoder_start_token_id")}
    return {key: value for key, value in tokens.items() if value is not None}


def family_of(config: ModelConfig) -> Family | None:
    """The family that the model was read from if it still can state it, else the first one that can, or None."""
    own = config.extra.get("model_type")
    ordered = sorted(FAMILIES, key=lambda family: family.model_type != own)
    return next((family for family in ordered if _expresses(family, config)), None)


def _expresses(family: Family, config: ModelConfig) -> bool:
    """True if the family's config.json of this configuration reads back as the same arithmetic."""
    if config.head not in family.architectures or (config.pooler and not family.pooler):
        return False
    try:
        read_back = _from_family(family, _to_family(family, config), None)
    except (ConfigError, StopIteration):  # a field that the family has no key for, or a size that it derives otherwise
        return False
    return _arithmetic(read_back) == _arithmetic(config)


def _arithmetic(config: ModelConfig) -> ModelConfig:
    """The configuration with every field at a fixed value that does not change the logits of given weights."""
    same = {"attention": AttentionBackend.auto, "dropout": 0.0, "init_std": 1.0, "eos_token_ids": ()}
    same |= {"extra": {}, "pooler": False, "balance_loss": 0.0, "router_z_loss": 0.0}
    if len(config.mixture_layers) == config.n_layer:
        same["intermediate_size"] = config.expert_size
    if config.balance_bias:
        same["balance_bias"] = 1.0  # any step means that there is a bias
    if config.activation is not Activation.clamped_swiglu:
        same |= {name: ModelConfig.__dataclass_fields__[name].default for name in ("swiglu_alpha", "swiglu_limit")}
    if not config.n_experts:
        same |= {field: ModelConfig.__dataclass_fields__[field].default for field in EXPERT_FIELDS}
    if config.full_every:  # several periods can mean the same layers
        same |= {
            "full_every": None,
            "first_full": None,
            "extra": {"full": [*config.full_layers]} if config.full_layers else {},
        }
    if config.head is not Head.transform and not (config.head.scores and config.score_transform):
        same["transform_bias"] = True
    if config.head is not Head.score:
        same["score_mean"] = False
    if not config.head.scores:
        same["score_transform"] = False
    if not config.head.predicts_tokens:
        same["tie_embeddings"] = True
    if config.head is Head.none:
        same |= {"head_bias": False, "n_labels": 1}
    if config.attention_scale == config.head_dim**-0.5:
        same["attention_scale"] = None
    if config.rope_theta_local == config.rope_theta and config.rope_scaling.kind is RopeKind.none:
        same["rope_theta_local"] = None
    return replace(config, **same)


def _from_any(values: dict, stored: TensorFiles | None) -> tuple[ModelConfig, Iterable[Weight]]:
    """Configuration and table of weights of a config.json of any family; ConfigError for an unknown model_type."""
    kind = kind_of(values)
    if kind == NATIVE:
        config = ModelConfig.from_dict(values["model"])
        if stored is not None:
            check_blocks(config, stored.files)
        return config, native_table(config)
    for family in FAMILIES:
        if family.model_type == kind:
            config = _from_family(family, values, stored)
            config = config if stored is None else resolve_ties(family, config, stored)
            return config, family.rows(config)
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigError(f"model_type {kind!r} is not supported; supported: {known} (others: model=hf model.name=...)")


def _from_family(family: Family, given: dict, stored: TensorFiles | None) -> ModelConfig:
    """The configuration of a config.json of this family; ConfigError that names the key for what is not supported."""
    # keys that must have one value
    values = {**family.defaults, **_without_synonyms(family, given)}
    for key, needed in {**family.constants, "per_layer_config": None}.items():
        if values.get(key, needed) != needed:
            raise ConfigError(f"{key}={values[key]!r} is not supported for model_type {family.model_type!r}")
    check_quantization(values.get("quantization_config"), allowed=family.quantizations)
    if values.get("quantization_config") is not None and stored is not None and not stored.is_packed:
        raise ConfigError(
            f"quantization_config={values['quantization_config']!r}, and no tensor beside it is packed so: "
            "take it out of config.json if the weights are plain numbers"
        )
    # keys that are one field each, then those that need a codec
    fields = {name: values[key] for name, key in family.fields.items()}
    if type(fields["n_layer"]) is not int or not 0 < fields["n_layer"] <= MAX_LAYERS:  # before anything counts to it
        raise ConfigError(f"{family.fields['n_layer']}={fields['n_layer']!r} is no number from 1 to {MAX_LAYERS:,}")
    if "activation" in fields:
        if fields["activation"] not in ACTIVATIONS:
            supported = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation {fields['activation']!r} is not supported; supported: {supported}")
        fields["activation"] = ACTIVATIONS[fields["activation"]]
    for codec in family.codecs:
        fields |= codec.read(values)
    if fields.get("shape") is Shape.encoder and fields.get("window") is not None:
        raise ConfigError(f"is_causal={values.get('is_causal')!r} with a window ({fields['window']}) is not supported")
    # head, pooler, and keys that are kept to be written again
    head = family.head_of(values, stored)
    has_pooler = stored is not None and family.pooler and f"{family.pooler}.weight" in stored and not head.scores
    pooler = {"pooler": True} if has_pooler else {}
    known = {*family.keys, *WRITTEN} - {family.fields.get("activation")}
    extra = {key: value for key, value in given.items() if key not in known}
    # a field's error names the key of the file beside it
    try:
        return ModelConfig(
            **{**family.fixed, **_head_fields(family, head, values), **pooler, **fields},
            extra={**extra, "model_type": family.model_type},
        )
    except ConfigError as error:
        keys = [f"{name} is {key}" for name, key in family.fields.items() if f"model.{name}" in str(error).split()]
        raise ConfigError(f"{error}{' (' + ', '.join(keys) + ' here)' if keys else ''}") from None


def _without_synonyms(family: Family, values: dict) -> dict:
    """The values under each key's canonical name; ConfigError where two names of a key differ."""
    values = dict(values)
    for name, key in family.synonyms:
        if name in values:
            value = values.pop(name)
            if values.setdefault(key, value) != value:
                raise ConfigError(f"{name}={value!r} and {key}={values[key]!r} are one number here, and differ")
    return values


def _head_fields(family: Family, head: Head, values: dict) -> dict[str, object]:
    """The fields of ModelConfig that describe the head; transformers assumes two labels where config.json is silent."""
    if not head.scores:
        return {"head": head, "head_bias": family.head_bias and head is not Head.none}
    named = values.get("id2label")
    n = (values.get("num_labels") or 2) if named is None else len(named)
    dense = head is Head.score and family.score_bias
    bias = dense or head is Head.tokens or family.score_transform
    return {"head": head, "head_bias": bias, "n_labels": n, "score_dense": dense}


def check_blocks(config: ModelConfig, names: Iterable[str]) -> None:
    """ConfigError where the last block has no tensor among `names` (in our terms), before as many blocks are built."""
    pairs = {Shape.encoder_decoder: {"encoder.": config.n_layer, "decoder.": config.n_decoder_layer}}
    for part, n in pairs.get(config.shape, {"": 1 if config.share_layers else config.n_layer}).items():
        last = f"{part}blocks.{n - 1}."
        if not any(name.startswith(last) for name in names):
            raise ConfigError(f"the configuration has {n} layers, and tensors {last}* are missing")


def _to_family(family: Family, config: ModelConfig) -> dict[str, object]:
    """The content of config.json under this family; ConfigError from a codec for what the family cannot state."""
    values = {key: getattr(config, name) for name, key in family.fields.items()}
    if "activation" in family.fields:
        key = family.fields["activation"]
        same = [name for name, activation in ACTIVATIONS.items() if activation is config.activation]
        if not same:
            raise ConfigError(f"transformers has no word for activation={config.activation.value}")
        values[key] = config.extra[key] if config.extra.get(key) in same else same[0]  # some have several names
    for codec in family.codecs:
        values |= codec.write(config)
    if config.dropout or not set(family.dropouts) & set(config.extra):
        values |= dict.fromkeys(family.dropouts, config.dropout)
    extra = config.extra
    if config.head.scores and "id2label" not in extra:
        named = ONE_LABEL if config.n_labels == 1 else read_labels(extra, config.n_labels).values()
        extra = {**named, **extra}
    identity = {"model_type": family.model_type, "architectures": [family.architectures[config.head][0]]}
    return {**extra, **identity, **family.constants, **values}


def _shell(config: ModelConfig) -> torch.nn.Module:
    """The model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return build_model(config)


def native_table(config: ModelConfig) -> list[Weight]:
    """The table of weights of model_type genai_pl: every parameter and stored buffer under its own name."""
    model = _shell(config)
    kept = model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if name in kept]
    names = [name for name, _ in model.named_parameters()]  # a tied weight appears once
    return [Weight(name, (name,)) for name in names + buffers]
