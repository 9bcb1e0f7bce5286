"""The model before its first step, and the tokenizer that it reads by."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from genai_pl.data import add_missing, byte_tokenizer, pretrained_tokenizer
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.errors import ConfigError
from genai_pl.export import export_model
from genai_pl.load import load, resolve, resolve_adapter
from genai_pl.models import Model, ModelConfig, WrappedDecoder, build_model, load_wrapped
from genai_pl.modules import BaseModule
from genai_pl.peft import load_adapter
from genai_pl.trainer import make

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def start(
    config: DictConfig, data: RowsDataModule, objective: type[BaseModule]
) -> "tuple[Model | WrappedDecoder, PreTrainedTokenizerBase]":
    """The model before its first step, with the tokenizer that it reads by; both know the tokens that are needed."""
    wrapped = "name" in config.model
    if not (config.init_from or wrapped):
        tokenizer = build_tokenizer(config, data)
        add_missing(tokenizer, objective.needs)
        return build_model(model_config(config, len(tokenizer))), tokenizer
    if config.init_from:
        options = {k: config.model[k] for k in ("attention", "dropout")} if not wrapped else {}
        name = f"init_from={config.init_from}"
        model, tokenizer, _ = load(config.init_from, wrap=wrapped, **options)
    else:
        name = f"model.name={config.model.name}"
        model = load_wrapped(config.model.name, attention=config.model.attention)
        tokenizer = pretrained_tokenizer(config.model.name)
    data.seq_len = min(data.seq_len, model.config.max_seq_len)
    add_missing(tokenizer, objective.needs)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"{name}: its tokenizer lacks tokens that the objective needs, and its vocabulary of "
            f"{model.config.vocab_size} has no room for them; choose another objective or model"
        )
    return model.train(), tokenizer


def adapt(
    peft: DictConfig, model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase"
) -> Model | WrappedDecoder:
    """The model with the adapter that the group `peft` asks for, if any; only that is trained then."""
    if peft.init_from:
        return load_adapter(model, resolve_adapter(peft.init_from))
    if peft._target_ is None:
        return model
    node = OmegaConf.to_container(peft, resolve=True)
    node.pop("init_from")
    if "init_text" in node:
        text = node.pop("init_text")
        node["init_ids"] = tokenizer.encode(text, add_special_tokens=False) if text else None
    return make(node)(model)


def keep_base(
    config: DictConfig, run: Path, model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase"
) -> str | None:
    """Where the model can be had again as it begins, from any folder; random weights under an adapter are written down."""
    name = config.init_from or config.model.get("name")
    if name is not None:
        return str(resolve(name).resolve()) if Path(name).exists() or name == "auto" else name
    if config.peft._target_ is None and config.peft.init_from is None:
        return None
    folder = run / "base"
    if rank_zero_only.rank == 0 and not folder.exists():
        export_model(
            model, tokenizer, folder, card={"Base": f"Random weights of seed {config.seed}, under an adapter."}
        )
    return str(folder.resolve())


def build_tokenizer(config: DictConfig, data: RowsDataModule) -> "PreTrainedTokenizerBase":
    """The tokenizer that the group names; bpe learns from the training text."""
    if config.tokenizer.kind == "byte":
        return byte_tokenizer()
    if config.tokenizer.kind == "bpe":
        return data.train_tokenizer(config.tokenizer.vocab_size)
    return pretrained_tokenizer(config.tokenizer.name)


def model_config(config: DictConfig, n_tokens: int) -> ModelConfig:
    """The model's configuration with the vocabulary of the tokenizer."""
    found: ModelConfig = OmegaConf.to_object(config.model)
    if found.vocab_size is None:
        found.vocab_size = n_tokens
    if found.vocab_size < n_tokens:
        raise ConfigError(f"model.vocab_size ({found.vocab_size}) is below the tokenizer's {n_tokens} tokens")
    return found
