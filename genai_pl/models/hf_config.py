"""config.json of a Hugging Face folder, in both directions."""

from dataclasses import replace
from pathlib import Path

import torch

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.build import build_model
from genai_pl.models.families import ACTIVATIONS, FAMILIES, Family, Weight
from genai_pl.models.folder import read_json
from genai_pl.names import AttentionBackend, Head, RopeKind
from genai_pl.specs import ModelConfig

NATIVE = "genai_pl"  # model_type of a folder that no class of transformers can express


def read_config(file: Path) -> tuple[ModelConfig, list[Weight]]:
    """The configuration that a config.json describes, and where its tensors lie; CheckpointError if we cannot."""
    values = read_json(file)
    try:
        return _from_any(values)
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing") from None
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def is_supported(file: Path) -> bool:
    """Whether a config.json is of a family that our own models can be."""
    return read_json(file).get("model_type") in {NATIVE, *(family.model_type for family in FAMILIES)}


def write_config(config: ModelConfig) -> tuple[dict[str, object], list[Weight], str]:
    """What to write in config.json, where to write each tensor, and the name of the class that reads both."""
    family = family_of(config)
    if family is None:
        name = type(_shell(config)).__name__
        values = {"model_type": NATIVE, "architectures": [name], "model": config.to_dict()}
        return values, _native_table(config), NATIVE
    return _to_family(family, config), family.table(config), family.architectures[config.head][0]


def family_of(config: ModelConfig) -> Family | None:
    """The first family whose config.json can say all that this configuration says, or None."""
    return next((family for family in FAMILIES if _expresses(family, config)), None)


def _expresses(family: Family, config: ModelConfig) -> bool:
    if config.head not in family.architectures:
        return False
    try:
        read_back = _from_family(family, _to_family(family, config))
    except (ConfigError, StopIteration):  # what the family cannot say, or a size that it derives otherwise
        return False
    return _arithmetic(read_back) == _arithmetic(config)


def _arithmetic(config: ModelConfig) -> ModelConfig:
    """The configuration without what does not change the logits of given weights."""
    same = {"attention": AttentionBackend.auto, "dropout": 0.0, "init_std": 1.0, "eos_token_ids": ()}
    if config.full_every and config.full_every > config.n_layer:
        same["full_every"] = None
    if config.head in (Head.none, Head.score):
        same |= {"tie_embeddings": True, "head_bias": False}
    if config.attention_scale == config.head_dim**-0.5:
        same["attention_scale"] = None
    if config.rope_theta_local == config.rope_theta and config.rope_scaling.kind is RopeKind.none:
        same["rope_theta_local"] = None
    return replace(config, **same)


def _from_any(values: dict) -> tuple[ModelConfig, list[Weight]]:
    kind = values["model_type"]
    if kind == NATIVE:
        config = ModelConfig.from_dict(values["model"])
        return config, _native_table(config)
    for family in FAMILIES:
        if family.model_type == kind:
            config = _from_family(family, values)
            return config, family.table(config)
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigError(f"model_type {kind!r} is not supported; supported: {known} (others: model=hf model.name=...)")


def _from_family(family: Family, values: dict) -> ModelConfig:
    values = {**family.defaults, **values}
    for key, needed in {**family.constants, "quantization_config": None}.items():
        if values.get(key, needed) != needed:
            raise ConfigError(f"{key}={values[key]!r} is not supported for model_type {family.model_type!r}")
    ours = {name: values[key] for name, key in family.fields.items()}
    if "activation" in ours:
        if ours["activation"] not in ACTIVATIONS:
            supported = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation {ours['activation']!r} is not supported; supported: {supported}")
        ours["activation"] = ACTIVATIONS[ours["activation"]]
    for codec in family.codecs:
        ours |= codec.read(values)
    head = family.head_of(values)
    if head is Head.score and len(values.get("id2label", ())) > 1:
        raise ConfigError("a model that scores texts has one label here")
    return ModelConfig(
        **{**family.fixed, "head": head, "head_bias": family.head_bias and head is not Head.none, **ours}
    )


def _to_family(family: Family, config: ModelConfig) -> dict[str, object]:
    values = {key: getattr(config, name) for name, key in family.fields.items()}
    if "activation" in family.fields:
        name = next(name for name, ours in ACTIVATIONS.items() if ours is config.activation)
        values[family.fields["activation"]] = name
    for codec in family.codecs:
        values |= codec.write(config)
    values |= dict.fromkeys(family.dropouts, config.dropout)
    name = family.architectures[config.head][0]
    if config.head is Head.score:
        values |= {
            "num_labels": 1,
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
            "problem_type": "regression",
        }
    return {"model_type": family.model_type, "architectures": [name], **family.constants, **values}


def _shell(config: ModelConfig) -> torch.nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return build_model(config)


def _native_table(config: ModelConfig) -> list[Weight]:
    model = _shell(config)
    kept = model.state_dict()
    buffers = [name for name, _ in model.named_buffers() if name in kept]
    names = [name for name, _ in model.named_parameters()]  # what is shared appears once
    return [Weight(name, (name,)) for name in names + buffers]
