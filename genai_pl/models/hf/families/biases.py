"""Biases of attention in config.json, for Llama and many after it: one key for all four projections."""

from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import Codec, Values


def _read(values: Values) -> dict[str, object]:
    return {"qkv_bias": values["attention_bias"], "o_bias": values["attention_bias"]}


def _write(config: ModelConfig) -> dict[str, object]:
    if config.qkv_bias != config.o_bias:
        raise ConfigError("this family has biases in all projections of its attention or in none")
    return {"attention_bias": config.qkv_bias}


ATTENTION_BIAS = Codec(_read, _write, ("attention_bias",))
