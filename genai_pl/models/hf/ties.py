"""Ties: which tensors of a folder are one, by config.json as far as the file agrees."""

import logging
from dataclasses import replace

from genai_pl.config.model import ModelConfig
from genai_pl.errors import ConfigError
from genai_pl.models.hf.families.family import Family
from genai_pl.models.hf.folder import TensorFiles

log = logging.getLogger(__name__)


def resolve_ties(family: Family, config: ModelConfig, stored: TensorFiles) -> ModelConfig:
    """The configuration with the ties that the file bears out; of tied tensors, one name becomes an alias of the other.

    As transformers 5 does: two that are stored and differ are not tied, whatever config.json says, and of two that are
    tied the file may leave out either. ConfigError where tensors differ that our model cannot hold apart.
    """
    if not config.head.predicts_tokens or not (config.tie_embeddings or family.always_ties):
        return config
    # a missing tensor is its partner, two equal ones are one, two different ones are not tied
    for name, source in family.ties:
        if name not in stored or source not in stored:
            if name in stored:
                stored.alias(source, name)
            elif source in stored:
                stored.alias(name, source)
        elif not stored.equal(name, source):
            if name.endswith(".bias"):
                stored.alias(source, name)  # the one that transformers adds
            elif name != family.ties[0][0]:
                raise ConfigError(f"tensors {name} and {source} differ, and are one here")
            elif config.tie_embeddings:
                config = replace(config, tie_embeddings=False)
                log.warning("%s: %s is not %s, and is used", stored.folder, name, source)
    return config
