"""The model before its first step, and the tokenizer that it reads by."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from genai_pl.data import add_missing, byte_tokenizer, pretrained_tokenizer
from genai_pl.data.chat import ensure_template
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.ends import UNSAID, WritingDefaults, read_defaults, set_ends
from genai_pl.errors import ConfigError
from genai_pl.evaluation.vectors import described_head
from genai_pl.export import export_model, read_alike
from genai_pl.loading import load
from genai_pl.models import Model, ModelConfig, WrappedDecoder, build_model, load_wrapped
from genai_pl.models.resize import fill_vocabulary, resize_vocabulary
from genai_pl.models.sentence import SentenceHead
from genai_pl.modules import BaseModule
from genai_pl.peft import load_adapter
from genai_pl.references import folder_of, resolve, resolve_adapter
from genai_pl.targets import make

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


class Start(NamedTuple):
    """A model before its first step, its tokenizer, whether it lies nowhere yet, and what the folder it came from says."""

    model: Model | WrappedDecoder
    tokenizer: "PreTrainedTokenizerBase"
    is_new: bool
    defaults: WritingDefaults = UNSAID
    sentence: SentenceHead | None = None  # how it makes a vector of a text, if its folder says so


def start(config: DictConfig, data: RowsDataModule, objective: type[BaseModule]) -> Start:
    """The model before its first step, with the tokenizer that it reads by; both know the tokens that are needed."""
    wrapped = "name" in config.model
    if not (config.init_from or wrapped):
        tokenizer = build_tokenizer(config, data)
        complete_tokenizer(tokenizer, data, objective)
        model = build_model(model_config(config, len(tokenizer)))
        set_ends(model.config, tokenizer)
        return Start(model, tokenizer, True)
    if config.init_from:
        options = {k: config.model[k] for k in ("attention", "dropout")} if not wrapped else {}
        loaded = load(config.init_from, wrap=wrapped, option="init_from", **options)
        model, tokenizer, path = loaded
        defaults = loaded.defaults
        sentence = described_head(path, tokenizer, model.config) if objective.embeds else None
    else:
        model = load_wrapped(config.model.name, attention=config.model.attention)
        tokenizer, sentence = pretrained_tokenizer(config.model.name), None
        defaults = read_defaults(folder_of(config.model.name))
    data.seq_len = min(data.seq_len, model.config.max_seq_len)
    known, room = len(tokenizer), model.config.vocab_size
    complete_tokenizer(tokenizer, data, objective)
    n_tokens = len(tokenizer)
    if n_tokens > known and known < room:
        fill_vocabulary(model, known, min(n_tokens, room))
    if n_tokens > room:
        resize_vocabulary(model, n_tokens)
    if n_tokens > min(known, room):
        log.info("vocabulary  %s tokens more than the model knew (%s)", n_tokens - min(known, room), f"{known:,}")
    set_ends(model.config, tokenizer, defaults)
    return Start(model.train(), tokenizer, n_tokens > min(known, room), defaults, sentence)


def check_shape(model: Model | WrappedDecoder, objective: type[BaseModule]) -> None:
    """ConfigError for a model of a shape that the objective cannot train."""
    if (shape := model.config.shape.value) not in objective.shapes:
        name = HydraConfig.get().runtime.choices.objective
        raise ConfigError(f"objective={name} needs a model of shape {' or '.join(objective.shapes)}, not {shape}")


def complete_tokenizer(tokenizer: "PreTrainedTokenizerBase", data: RowsDataModule, objective: type[BaseModule]) -> None:
    """Give the tokenizer the special tokens that the objective needs, and a chat template where the data are conversations."""
    add_missing(tokenizer, objective.needs)
    if data.has_conversations():
        ensure_template(tokenizer)


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
    return make(node, at="peft")(model)


def keep_base(config: DictConfig, run: Path, begun: Start) -> str | None:
    """Where the model can be had again as it begins, from any folder; a new one under an adapter is written down."""
    name = config.init_from or config.model.get("name")
    if not begun.is_new:
        return str(resolve(name).resolve()) if Path(name).exists() or name == "auto" else name
    if config.peft._target_ is None and config.peft.init_from is None:
        return None
    folder = run / "base"
    if rank_zero_only.rank == 0 and not folder.exists():
        what = f"{name}, with more tokens" if name else f"Random weights of seed {config.seed}"
        written = {"card": {"Base": f"{what}, under an adapter."}, "defaults": begun.defaults}
        with read_alike(begun.model, begun.tokenizer):
            export_model(begun.model, begun.tokenizer, folder, **written)
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
