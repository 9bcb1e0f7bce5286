"""The data of a run without its model: data module, tokenizer and collator, built from the configuration of train.py.

A model's tokenizer and context are read from its files; its weights are not. The collator comes from the objective's own
module, built around a model on the meta device, which has no memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig, OmegaConf

from genai_pl.atomic_io import ADAPTER, is_checkpoint, is_gguf
from genai_pl.checkpoints.file import MARK, read_contents
from genai_pl.config.enums import Shape
from genai_pl.config.model import ModelConfig
from genai_pl.data import pretrained_tokenizer
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.loader import Collate
from genai_pl.data.tokenizer import tokenizer_from_files
from genai_pl.evaluation.embeddings import saved_sentence_head
from genai_pl.loading import base_of, describe_gguf
from genai_pl.models import build_empty
from genai_pl.models.hf.folder import read_json
from genai_pl.models.hf.transformers_config import ENDLESS, N_EMBD, N_POSITIONS
from genai_pl.modules import BaseModule
from genai_pl.references import resolve
from genai_pl.training.build import build_module
from genai_pl.training.data_sources import build_data
from genai_pl.training.initial_model import build_tokenizer, complete_tokenizer
from genai_pl.training.targets import locate_target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StoredModel(NamedTuple):
    """A model without its weights: its folder or checkpoint, and its width.

    tokenizer: None until the rows are read, where it is learned from them. context: tokens that it reads at most, None where
    its files do not say.
    """

    tokenizer: "PreTrainedTokenizerBase | None"
    context: int | None
    path: Path | None = None
    n_embd: int = 8


class DataOnly(NamedTuple):
    """The data of a run, and the model that reads them."""

    data: RowsDataModule
    objective: type[BaseModule]
    model: StoredModel

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return self.model.tokenizer


def open_data(config: DictConfig) -> DataOnly:
    """The data module of a configuration, and the tokenizer and context of its model, before any row is read."""
    objective = locate_target(config.objective._target_)
    data = build_data(config, objective)
    wraps = "name" in config.model
    if not config.init_from and not wraps:
        return DataOnly(data, objective, StoredModel(None, config.model.max_seq_len))
    option = "init_from" if config.init_from else "model.name"
    model = stored_model(OmegaConf.select(config, option), option=option)
    if wraps:
        model = model._replace(context=min(model.context or config.model.max_seq_len, config.model.max_seq_len))
    return DataOnly(data, objective, model)


def tokenize_data(config: DictConfig, opened: DataOnly) -> DataOnly:
    """The data with `train_rows` and `val_rows` as a run reads them, and the tokenizer with the objective's tokens."""
    data, objective, stored = opened
    tokenizer, context = stored.tokenizer or build_tokenizer(config, data), stored.context
    complete_tokenizer(tokenizer, data, objective)
    if objective.labelled:
        data.find_labels(None)
        data.prepare_tokenizer(tokenizer)
    # rows fit the context, of which virtual tokens take a part
    virtual = config.peft.get("n_tokens", 0) if config.peft._target_ else 0
    seq_len = min(config.data.seq_len, context - virtual) if context else config.data.seq_len
    sizes = {
        "batch_size": config.data.batch_size,
        "val_batch_size": config.data.val_batch_size or config.data.batch_size,
    }
    data.fit_to_model(seq_len=seq_len, **sizes)
    stored = stored._replace(tokenizer=tokenizer)
    data.prepare(tokenizer, collator_of(config, objective, stored))
    return opened._replace(model=stored)


def collator_of(config: DictConfig, objective: type[BaseModule], stored: StoredModel) -> Collate:
    """The collator of the objective's module, around a model of one layer without memory.

    An objective that embeds texts completes the tokenizer, as the folder of its model says.
    """
    own = OmegaConf.to_object(config.model) if "name" not in config.model else None
    tokenizer = stored.tokenizer
    sizes = {"vocab_size": len(tokenizer), "n_layer": 1}
    if isinstance(own, ModelConfig) and own.shape.value in objective.shapes and not stored.path:
        model_config = replace(own, **sizes)
    else:
        sizes["max_seq_len"] = stored.context or ENDLESS
        model_config = ModelConfig(shape=Shape(objective.shapes[0]), n_embd=8, n_head=1, **sizes)
    if OmegaConf.is_missing(config.objective, "reward"):  # rows do not depend on it
        config = config.copy()
        config.objective.reward = "unused"
    module = build_module(config, build_empty(model_config), tokenizer)
    if objective.embeds:
        head = None
        if stored.path:
            width = {"n_embd": stored.n_embd, "embedding_size": stored.n_embd}
            head = saved_sentence_head(stored.path, tokenizer, replace(model_config, **width))
        module.use_sentence(head, tokenizer)
    return module.collator


def stored_model(reference: str, *, option: str) -> StoredModel:
    """The model of a reference without its weights.

    An adapter without a tokenizer has that of its base; the context is always the base's.
    """
    path = resolve(reference, option=option)
    if is_checkpoint(path):
        contents = read_contents(path)[MARK]
        stored = contents["model"].get("wrapped", contents["model"])
        return _stored(tokenizer_from_files(contents["tokenizer"]), stored, path)
    if is_gguf(path):
        model_config, tokenizer = describe_gguf(path)
        return StoredModel(tokenizer, model_config.max_seq_len, path, model_config.n_embd)
    if (path / ADAPTER).is_file():
        base = stored_model(base_of(path), option=option)
        has_tokenizer = (path / "tokenizer.json").is_file()
        return base._replace(tokenizer=pretrained_tokenizer(str(path)) if has_tokenizer else base.tokenizer, path=path)
    return _stored(pretrained_tokenizer(str(path)), read_json(path / "config.json"), path)


def _stored(tokenizer: "PreTrainedTokenizerBase", values: Mapping[str, object], path: Path) -> StoredModel:
    """The model of a configuration, whose sizes have several names."""
    context, n_embd = (
        next((values[name] for name in names if isinstance(values.get(name), int)), None)
        for names in (N_POSITIONS, N_EMBD)
    )
    return StoredModel(tokenizer, context, path, n_embd or StoredModel._field_defaults["n_embd"])
