"""The data of a run without its model: data module, tokenizer and collator, built from the configuration of train.py.

A model's tokenizer and context are read from its files; its weights are not. The collator comes from the objective's own
module, built around a model on the meta device, which has no memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from genai_pl.atomic_io import ADAPTER, is_checkpoint, is_gguf
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.data import pretrained_tokenizer
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.loader import Collate
from genai_pl.data.tokenizer import tokenizer_from_files
from genai_pl.errors import ConfigError
from genai_pl.loading import base_of, describe_gguf
from genai_pl.models import build_model
from genai_pl.models.hf.folder import read_json
from genai_pl.models.hf.transformers_config import N_POSITIONS
from genai_pl.modules import BaseModule
from genai_pl.references import resolve
from genai_pl.training.build import build_module
from genai_pl.training.data_sources import build_data
from genai_pl.training.initial_model import build_tokenizer, complete_tokenizer
from genai_pl.training.targets import locate_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DataOnly(NamedTuple):
    """The data of a run.

    tokenizer: None until the rows are read, where it is learned from them. context: tokens that the model reads at most,
    None where its files do not say.
    """

    data: RowsDataModule
    objective: type[BaseModule]
    tokenizer: "PreTrainedTokenizerBase | None"
    context: int | None


def open_data(config: DictConfig) -> DataOnly:
    """The data module of a configuration, and the tokenizer and context of its model, before any row is read.

    ConfigError for objectives with labels, whose outputs are a part of the model.
    """
    objective = locate_target(config.objective._target_)
    if objective.labelled:
        name = HydraConfig.get().runtime.choices.objective
        raise ConfigError(
            f"objective={name}: its labels are a part of the model; data.py reads texts and conversations"
        )
    data = build_data(config, objective)
    wraps = "name" in config.model
    if not config.init_from and not wraps:
        return DataOnly(data, objective, None, config.model.max_seq_len)
    option = "init_from" if config.init_from else "model.name"
    tokenizer, context = stored_tokenizer(OmegaConf.select(config, option), option=option)
    if wraps:
        context = min(context or config.model.max_seq_len, config.model.max_seq_len)
    return DataOnly(data, objective, tokenizer, context)


def tokenize_data(config: DictConfig, opened: DataOnly) -> DataOnly:
    """The data with `train_rows` and `val_rows` as a run reads them, and the tokenizer with the objective's tokens."""
    data, objective, tokenizer, context = opened
    tokenizer = tokenizer or build_tokenizer(config, data)
    complete_tokenizer(tokenizer, data, objective)
    # rows fit the context, of which virtual tokens take a part
    virtual = config.peft.get("n_tokens", 0) if config.peft._target_ else 0
    seq_len = min(config.data.seq_len, context - virtual) if context else config.data.seq_len
    sizes = {
        "batch_size": config.data.batch_size,
        "val_batch_size": config.data.val_batch_size or config.data.batch_size,
    }
    data.fit_to_model(seq_len=seq_len, **sizes)
    data.prepare(tokenizer, collator_of(config, objective, tokenizer))
    return opened._replace(tokenizer=tokenizer)


def collator_of(config: DictConfig, objective: type[BaseModule], tokenizer: "PreTrainedTokenizerBase") -> Collate:
    """The collator of the objective's module, around a model of one layer without memory."""
    own = OmegaConf.to_object(config.model) if "name" not in config.model else None
    sizes = {"vocab_size": len(tokenizer), "n_layer": 1}
    if isinstance(own, ModelConfig) and own.shape.value in objective.shapes:
        model_config = replace(own, **sizes)
    else:
        model_config = ModelConfig(shape=Shape(objective.shapes[0]), n_embd=8, n_head=1, max_seq_len=8, **sizes)
    if OmegaConf.is_missing(config.objective, "reward"):  # rows do not depend on it
        config = config.copy()
        config.objective.reward = "unused"
    with torch.device("meta"):
        model = build_model(model_config)
    return build_module(config, model, tokenizer).collator


def stored_tokenizer(reference: str, *, option: str) -> "tuple[PreTrainedTokenizerBase, int | None]":
    """The tokenizer of a reference and the tokens that its model reads, without its weights.

    An adapter without a tokenizer has that of its base; the context is always the base's.
    """
    path = resolve(reference, option=option)
    if is_checkpoint(path):
        contents = read_contents(path)[MARK]
        stored = contents["model"].get("wrapped", contents["model"])
        return tokenizer_from_files(contents["tokenizer"]), _context(stored)
    if is_gguf(path):
        model_config, tokenizer = describe_gguf(path)
        return tokenizer, model_config.max_seq_len
    if (path / ADAPTER).is_file():
        base, context = stored_tokenizer(base_of(path), option=option)
        return (pretrained_tokenizer(str(path)) if (path / "tokenizer.json").is_file() else base), context
    return pretrained_tokenizer(str(path)), _context(read_json(path / "config.json"))


def _context(values: Mapping[str, object]) -> int | None:
    """The tokens that a model reads, by the names that configurations have for them; None if none of them is there."""
    return next((values[name] for name in N_POSITIONS if isinstance(values.get(name), int)), None)
