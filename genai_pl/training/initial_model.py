"""The initial model: weights and tokenizer before the first step, and the checks that they fit the configuration.

Four sources: random weights with a tokenizer of the group `tokenizer`, weights of `init_from` (a run, a checkpoint,
a Hugging Face folder), a model that transformers runs (`model=hf`), or an adapter on any of these. Special tokens
that the objective needs, such as mask or pad, are added to tokenizer and embeddings here.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from genai_pl.data import add_missing_tokens, byte_tokenizer, pretrained_tokenizer
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.generation_defaults import NO_DEFAULTS, GenerationDefaults, read_generation_defaults, set_end_tokens
from genai_pl.data.prompt_tokens import ensure_template
from genai_pl.errors import ConfigError
from genai_pl.evaluation.embeddings import saved_sentence_head
from genai_pl.exporting import export_model, read_alike
from genai_pl.loading import load
from genai_pl.models import Model, ModelConfig, WrappedDecoder, build_model, load_wrapped
from genai_pl.models.hf.transformers_config import WrappedConfig
from genai_pl.models.keep_layers import keep_layers
from genai_pl.models.resize import fill_vocabulary, resize_vocabulary
from genai_pl.models.sentence import SentenceHead
from genai_pl.models.upcycle import upcycle, upcycled_config
from genai_pl.models.virtual_tokens import n_virtual
from genai_pl.modules import BaseModule
from genai_pl.peft import load_adapter
from genai_pl.ranks import is_first_process
from genai_pl.references import folder_of, resolve, resolve_adapter
from genai_pl.training.hydra_job import job_overrides
from genai_pl.training.other_model import refuse_other_model
from genai_pl.training.output_folders import register_early_output
from genai_pl.training.resume import TYPED_ARGUMENTS
from genai_pl.training.targets import instantiate
from genai_pl.training.trust import key_of
from genai_pl.training.unused_options import TRAIN_RULES, unused_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


class InitialModel(NamedTuple):
    """A model before its first step.

    model, tokenizer: with the tokens that the objective needs. is_new: True if these weights exist nowhere yet,
    so that an adapter trained on them needs a saved base. defaults: generation settings of the folder that the
    model came from.
    sentence: how that folder makes a vector of a text (pooling, dense layer), None if it does not say.
    """

    model: Model | WrappedDecoder
    tokenizer: "PreTrainedTokenizerBase"
    is_new: bool
    defaults: GenerationDefaults = NO_DEFAULTS
    sentence: SentenceHead | None = None  # pooling and dense layer in its folder


def build_initial_model(config: DictConfig, data: RowsDataModule, objective: type[BaseModule]) -> InitialModel:
    """The model before its first step, and its tokenizer; both know the special tokens of the objective.

    Weights are on the CPU and in training mode. Raises ConfigError or CheckpointError for a source that cannot
    be loaded.
    """
    wraps_transformers = "name" in config.model
    # random weights: the tokenizer first, its size is the vocabulary
    if not (config.init_from or wraps_transformers):
        tokenizer = build_tokenizer(config, data)
        complete_tokenizer(tokenizer, data, objective)
        model = build_model(model_config(config, len(tokenizer)))
        set_end_tokens(model.config, tokenizer)
        return InitialModel(model, tokenizer, True)
    # trained weights, which bring their tokenizer and generation defaults
    if config.init_from:
        options = {k: config.model[k] for k in ("attention", "dropout")} if not wraps_transformers else {}
        loaded = load(config.init_from, wrap=wraps_transformers, option="init_from", **options)
        model, tokenizer, path = loaded
        shortened = config.init_layers is not None
        if shortened:
            keep_layers(model, config.init_layers if isinstance(config.init_layers, int) else list(config.init_layers))
        before = model.config
        if not wraps_transformers:
            model = with_experts(model, config.model)
        upcycled = shortened or (model.config is not before and not before.n_experts)
        defaults = loaded.defaults
        sentence = saved_sentence_head(path, tokenizer, model.config) if objective.embeds else None
    else:
        model, upcycled = load_wrapped(config.model.name, attention=config.model.attention), False
        tokenizer, sentence = pretrained_tokenizer(config.model.name), None
        defaults = read_generation_defaults(folder_of(config.model.name))
    # rows of the embedding for new tokens: first those that the file has spare, then more
    n_known, capacity = len(tokenizer), model.config.vocab_size
    complete_tokenizer(tokenizer, data, objective)
    n_tokens = len(tokenizer)
    if n_tokens > n_known and n_known < capacity:
        fill_vocabulary(model, n_known, min(n_tokens, capacity))
    if n_tokens > capacity:
        resize_vocabulary(model, n_tokens)
    if n_tokens > min(n_known, capacity):
        log.info(
            "vocabulary  %s tokens more than the model knew (%s)", n_tokens - min(n_known, capacity), f"{n_known:,}"
        )
    set_end_tokens(model.config, tokenizer, defaults)
    is_new = upcycled or n_tokens > min(n_known, capacity)
    return InitialModel(model.train(), tokenizer, is_new, defaults, sentence)


def with_experts(model: Model | WrappedDecoder, options: DictConfig) -> Model | WrappedDecoder:
    """A loaded model with the run's auxiliary losses of routing; with experts, where it is dense and `options` has some."""
    if isinstance(model.config, ModelConfig):
        config = routed_config(model.config, options)
        if config.n_experts and not model.config.n_experts:
            log.info("upcycled    every expert starts as the dense MLP: %d experts", config.n_experts)
            return upcycle(model, config)
        if config.n_experts:
            model.config = config
    return model


def routed_config(loaded: ModelConfig, options: DictConfig) -> ModelConfig:
    """The configuration of a loaded model in this run: its losses of routing are the run's, a dense one may be upcycled."""
    if options.n_experts and not loaded.n_experts:
        return upcycled_config(loaded, OmegaConf.to_container(options, resolve=True))
    if not loaded.n_experts:
        return loaded
    return replace(loaded, balance_loss=options.balance_loss, router_z_loss=options.router_z_loss)


def check_shape(config: DictConfig, model: ModelConfig | WrappedConfig, objective: type[BaseModule]) -> None:
    """ConfigError for a model whose shape or head the objective cannot train."""
    name = HydraConfig.get().runtime.choices.objective
    if (shape := model.shape.value) not in objective.shapes:
        raise ConfigError(f"objective={name} needs a model of shape {' or '.join(objective.shapes)}, not {shape}")
    if objective.head is None and not model.head.predicts_tokens:
        source = f"init_from={config.init_from}" if config.init_from else f"model.head={model.head.value}"
        raise ConfigError(
            f"{source}: a model that embeds or scores texts, without the language-model head that objective={name} "
            "trains; give one that has it"
        )


def complete_tokenizer(tokenizer: "PreTrainedTokenizerBase", data: RowsDataModule, objective: type[BaseModule]) -> None:
    """Add the special tokens that the objective needs, and a chat template if the data are conversations."""
    add_missing_tokens(tokenizer, objective.needs)
    if data.has_conversations():
        ensure_template(tokenizer)


def apply_peft(
    peft: DictConfig, model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase"
) -> Model | WrappedDecoder:
    """The model with the adapter of the group `peft`, and only that trainable; the model itself where there is
    none.

    init_from goes on with a saved adapter, _target_ makes a new one. init_text is tokenized here, for soft
    prompts.
    """
    if peft.init_from:
        return load_adapter(model, resolve_adapter(peft.init_from, option="peft.init_from"))
    if peft._target_ is None:
        return model
    node = OmegaConf.to_container(peft, resolve=True)
    node.pop("init_from")
    if "init_text" in node:
        text = node.pop("init_text")
        node["init_ids"] = tokenizer.encode(text, add_special_tokens=False) if text else None
    return instantiate(node, at="peft")(model)


def save_base(config: DictConfig, run_folder: Path, initial: InitialModel) -> str | None:
    """Reference from which the base of an adapter can be loaded again from any folder; None if there is no adapter
    on new weights.

    Weights that exist nowhere (random ones, or with added tokens) are exported to `base/` in the run folder: an
    adapter without its base cannot be used.
    """
    name = config.init_from or config.model.get("name")
    if not initial.is_new:
        return str(resolve(name).resolve()) if Path(name).exists() or name == "auto" else name
    if config.peft._target_ is None and config.peft.init_from is None:
        return None
    folder = run_folder / "base"
    if is_first_process() and not folder.exists():
        register_early_output(folder)
        origin = f"{name}, with more tokens" if name else f"Random weights of seed {config.seed}"
        export_options = {"card": {"Base": f"{origin}, under an adapter."}, "defaults": initial.defaults}
        with read_alike(initial.model, initial.tokenizer):
            export_model(initial.model, initial.tokenizer, folder, **export_options)
    return str(folder.resolve())


def build_tokenizer(config: DictConfig, data: RowsDataModule) -> "PreTrainedTokenizerBase":
    """The tokenizer of the group `tokenizer`; kind=bpe learns it from the training text."""
    if config.tokenizer.kind == "byte":
        return byte_tokenizer()
    if config.tokenizer.kind == "bpe":
        return data.train_tokenizer(config.tokenizer.vocab_size)
    return pretrained_tokenizer(config.tokenizer.name)


def model_config(config: DictConfig, n_tokens: int) -> ModelConfig:
    """The model's configuration with the vocabulary size of the tokenizer; ConfigError for a smaller one."""
    values: ModelConfig = OmegaConf.to_object(config.model)
    if values.vocab_size is None:
        values.vocab_size = n_tokens
    if values.vocab_size < n_tokens:
        raise ConfigError(f"model.vocab_size ({values.vocab_size}) is below the tokenizer's {n_tokens} tokens")
    return values


def new_overrides(config: DictConfig) -> list[str]:
    """Overrides typed for this command: without those of a resumed run's folder; [] on ranks other than 0."""
    if not is_first_process():
        return []
    typed_keys = {key_of(a) for a in TYPED_ARGUMENTS}
    return [o for o in job_overrides() if not config.resume or key_of(o) in typed_keys]


def report_unused(config: DictConfig, typed: list[str]) -> None:
    """Log a line for each typed option without effect; ConfigError for max_steps typed beside max_epochs, which
    wins.
    """
    has_both = config.trainer.max_epochs is not None and config.trainer.max_steps not in (None, -1)
    if max_steps := next((o for o in typed if has_both and key_of(o) == "trainer.max_steps"), None):
        epochs = config.trainer.max_epochs
        raise ConfigError(
            f"{max_steps}: has no effect beside trainer.max_epochs={epochs}, which counts; set one to null"
        )
    for line in unused_lines(config, typed, TRAIN_RULES):
        log.info("unused      %s", line)


def check_loaded_model(
    config: DictConfig, loaded: object, tokenizer: "PreTrainedTokenizerBase", typed: Sequence[str]
) -> None:
    """ConfigError for typed options of `model` and `tokenizer` that contradict what was loaded. Options that
    nobody typed are
    ignored: a loaded model brings its own.
    """
    source = f"init_from={config.init_from}" if config.init_from else f"model.name={config.model.get('name')}"
    if any(key_of(a).startswith("model") for a in typed):
        refuse_other_model(OmegaConf.to_object(config.model), loaded, typed, source=source)
    argument = next((a for a in typed if key_of(a).partition(".")[0] == "tokenizer"), None)
    if argument is not None and not _is_tokenizer(config, tokenizer):
        raise ConfigError(f"{argument}: has no effect: {source} brings a tokenizer of its own; leave it out")


def _is_tokenizer(config: DictConfig, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if the loaded tokenizer can be the one that the options describe, tokens added since then aside."""
    vocabulary, options = tokenizer.get_vocab(), config.tokenizer
    if options.kind == "bpe":
        return options.vocab_size in (tokenizer.vocab_size, len(vocabulary))
    expected = byte_tokenizer() if options.kind == "byte" else pretrained_tokenizer(options.name)
    return expected.get_vocab().items() <= vocabulary.items()


def fit_to_context(config: DictConfig, model: Model | WrappedDecoder) -> tuple[int, int, str | None]:
    """(batch size, seq_len, line): the batch cut to the model's context, and a line on the change, or None.

    The context is max_seq_len less the adapter's virtual tokens; ConfigError where these leave no room. A
    default batch size, given as tokens per batch, is recomputed for the shorter rows; one that the user typed
    stays.
    """
    n_prefix = n_virtual(model)
    seq_len, longest = config.data.seq_len, model.config.max_seq_len - n_prefix
    # no room for text
    if n_prefix and longest < 2:
        source = "peft.n_tokens" if config.peft._target_ else "peft.init_from" if config.peft.init_from else "init_from"
        value = OmegaConf.select(config, source)
        raise ConfigError(
            f"{source}={value}: {n_prefix} virtual tokens leave no text to learn in the model's context of "
            f"{model.config.max_seq_len}; {'lower it' if source == 'peft.n_tokens' else 'give one of fewer'}"
        )
    if seq_len <= longest:
        return config.data.batch_size, seq_len, None
    # shorter rows, and more of them if their number is a default
    less = f" less {n_prefix} virtual tokens" if n_prefix else ""
    line = f"data.seq_len {seq_len:,} -> {longest:,}: the model's context{less}"
    fitted_size = batch_size = config.data.batch_size
    if isinstance(config.data._get_node("batch_size")._value(), str):  # an interpolation: nobody has typed a number
        clamped_config = config.copy()
        clamped_config.data.seq_len = longest
        fitted_size = clamped_config.data.batch_size
    if fitted_size != batch_size:
        line += f"; data.batch_size {batch_size:,} -> {fitted_size:,}: as many tokens"
    return fitted_size, longest, line
