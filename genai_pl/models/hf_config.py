"""config.json of a Hugging Face folder, in both directions."""

from dataclasses import replace
from pathlib import Path

import torch

from genai_pl.errors import CheckpointError, ConfigError
from genai_pl.models.decoder import Decoder
from genai_pl.models.families import ACTIVATIONS, FAMILIES, Family, Weight
from genai_pl.models.folder import read_json
from genai_pl.specs import AttentionBackend, ModelConfig

NATIVE = "genai_pl"  # model_type of a folder that no class of transformers can express
PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def read_config(file: Path) -> tuple[ModelConfig, list[Weight]]:
    """The configuration that a config.json describes, and where its tensors lie; CheckpointError if we cannot."""
    values = read_json(file)
    try:
        return _from_any(values)
    except KeyError as error:
        raise CheckpointError(f"{file}: {error.args[0]} is missing") from None
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def write_config(config: ModelConfig) -> tuple[dict[str, object], list[Weight], str]:
    """What to write in config.json, where to write each tensor, and the name of the class that reads both."""
    family = family_of(config)
    if family is None:
        values = {"model_type": NATIVE, "architectures": [Decoder.__name__], "model": config.to_dict()}
        return values, _native_table(config), NATIVE
    return _to_family(family, config), family.table(config), family.architecture


def family_of(config: ModelConfig) -> Family | None:
    """The first family whose config.json can say all that this configuration says, or None."""
    return next((family for family in FAMILIES if _expresses(family, config)), None)


def _expresses(family: Family, config: ModelConfig) -> bool:
    try:
        read_back = _from_family(family, _to_family(family, config))
    except ConfigError:  # a size that the family derives, and derives otherwise
        return False
    return _arithmetic(read_back) == _arithmetic(config)


def _arithmetic(config: ModelConfig) -> ModelConfig:
    """The configuration without what does not change the logits of given weights."""
    return replace(config, attention=AttentionBackend.auto, dropout=0.0, init_std=1.0)


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
    raise ConfigError(f"model_type {kind!r} is not supported; supported: {known}")


def _from_family(family: Family, values: dict) -> ModelConfig:
    values = {**family.defaults, **values, "rope_theta": _rope_theta(values, family.defaults.get("rope_theta"))}
    for key, needed in {**family.constants, "quantization_config": None}.items():
        if values.get(key, needed) != needed:
            raise ConfigError(f"{key}={values[key]!r} is not supported for model_type {family.model_type!r}")
    ours = {name: values[key] for name, key in family.fields.items()}
    if ours["activation"] not in ACTIVATIONS:
        raise ConfigError(f"activation {ours['activation']!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ModelConfig(**{**family.fixed, **ours, "activation": ACTIVATIONS[ours["activation"]]})


def _rope_theta(values: dict, default: float | None) -> float | None:
    """The base of the rotary frequencies: in rope_parameters (transformers 5), or beside rope_scaling (before)."""
    rope = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if key in values}
    rope |= values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = rope.pop("rope_theta", default)
    strange = [f"{k}={v!r}" for k, v in rope.items() if v is not None and v != PLAIN_ROPE.get(k)]
    if strange:
        raise ConfigError(f"rotary positions with {', '.join(strange)} are not supported")
    return theta


def _to_family(family: Family, config: ModelConfig) -> dict[str, object]:
    values = {key: getattr(config, name) for name, key in family.fields.items()}
    activation = next(name for name, ours in ACTIVATIONS.items() if ours is config.activation)
    values |= {family.fields["activation"]: activation, **dict.fromkeys(family.dropouts, config.dropout)}
    if "rope_theta" in values:  # said twice: transformers 5 reads the second, transformers 4 the first
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {"model_type": family.model_type, "architectures": [family.architecture], **family.constants, **values}


def _native_table(config: ModelConfig) -> list[Weight]:
    with torch.device("meta"):
        names = Decoder(config).state_dict()
    return [Weight(n, (n,)) for n in names if not (config.tie_embeddings and n == "lm_head.weight")]
