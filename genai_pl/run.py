"""Configuration becomes objects, here only: a resolved configuration in, a run folder out."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from genai_pl.data import add_missing, byte_tokenizer, pretrained_tokenizer, vocabulary
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError
from genai_pl.export import export_model
from genai_pl.fit import Parts, finish, fit
from genai_pl.load import load, resolve, resolve_adapter
from genai_pl.models import Model, ModelConfig, WrappedDecoder, build_model, load_wrapped
from genai_pl.models.virtual import VirtualTokens
from genai_pl.modules import BaseModule
from genai_pl.modules.base import n_replicas
from genai_pl.modules.rl import RLModule
from genai_pl.peft import adapters_of, describe, load_adapter
from genai_pl.resume import choose_checkpoint, describe_resume
from genai_pl.rewards import load_rewards
from genai_pl.strategies import launched
from genai_pl.summary import describe_model, describe_step
from genai_pl.trainer import build_trainer, connect, count_steps, make

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(config: DictConfig) -> int:
    """Train as the configuration says; the exit status is 0, or 130 after Ctrl-C."""
    quiet()
    torch.set_float32_matmul_precision(config.precision.matmul)
    # model.attention=sdpa: cuDNN's kernel gives NaN gradients under a dense mask (pytorch/pytorch 196678, on H100)
    torch.backends.cuda.enable_cudnn_sdp(False)
    L.seed_everything(config.seed, verbose=False)
    run = relative(Path(config.output_dir))
    checkpoint = relative(choose_checkpoint(config.resume, run)) if config.resume else None
    parts = build(config, run)
    connect(config, parts, checkpoint)
    announce(config, parts, checkpoint)
    with launched(parts.trainer):
        fit(parts, checkpoint)
        return finish(parts, flat=flatten(config), export=config.callbacks.export)


def build(config: DictConfig, run: Path) -> Parts:
    """Every object of the run."""
    data = make(config.data, seed=config.seed)
    objective = get_class(config.objective._target_)
    if data.kind != objective.data_kind:
        names = HydraConfig.get().runtime.choices
        raise ConfigError(f"objective={names.objective} needs data={objective.data_kind}, not data={names.data}")
    model, tokenizer = start(config, data, objective)
    if objective.head is not None:
        model.set_head(objective.head)
    base = keep_base(config, run, model, tokenizer)
    model = adapt(config.peft, model, tokenizer)
    # virtual tokens of an adapter take their places from the text
    virtual = max((m.n_tokens for m in model.modules() if isinstance(m, VirtualTokens)), default=0)
    data.seq_len = min(data.seq_len, model.config.max_seq_len - virtual)
    module = build_module(config, model, tokenizer)
    if objective.needs_reward:
        connect_reward(config, module, tokenizer)
    trainer, callbacks = build_trainer(config, run, samples=model.config.writes)
    data.prepare(tokenizer, module.collator)
    steps = count_steps(config, data, n_replicas(trainer))
    module.total_steps = trainer.fit_loop.epoch_loop.max_steps = steps
    data.n_batches = steps * trainer.accumulate_grad_batches
    return Parts(run, trainer, module, data, tokenizer, **callbacks, base=base)


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


def adapt(peft: DictConfig, model: Model | WrappedDecoder, tokenizer: "PreTrainedTokenizerBase") -> Model | WrappedDecoder:
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
        export_model(model, tokenizer, folder, card={"Base": f"Random weights of seed {config.seed}, under an adapter."})
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


def build_module(config: DictConfig, model: Model, tokenizer: "PreTrainedTokenizerBase") -> BaseModule:
    """The LightningModule of the objective, around the model."""
    shapes = get_class(config.objective._target_).shapes
    if model.config.shape.value not in shapes:
        name = HydraConfig.get().runtime.choices.objective
        raise ConfigError(
            f"objective={name} needs a model of shape {' or '.join(shapes)}, not {model.config.shape.value}"
        )
    module = make(config.objective)(
        model,
        vocabulary=vocabulary(tokenizer, model.config.vocab_size),
        seed=config.seed,
        optimizer=make(config.optimizer),
        schedule=make(config.scheduler),
    )
    module.make_optimizer(module.trained())  # its mistakes are told before the data are read
    if config.compile:
        for block in model.blocks:
            block.compile()
    return module


def connect_reward(config: DictConfig, module: RLModule, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give a module that is judged in training its judges, and the clipping that Lightning leaves to it."""
    if config.trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches: rollouts have minibatches instead (objective.minibatch_size)"
        )
    device = choose_device("cpu" if config.trainer.accelerator == "cpu" else "auto")
    module.reward = load_rewards(module.reward_names, module.reward_weights, device=device)
    module.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    module.clip_norm, config.trainer.gradient_clip_val = config.trainer.gradient_clip_val, None


def announce(config: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, with which attention."""
    trainer, model = parts.trainer, parts.module.model
    device = trainer.strategy.root_device
    step = describe_step(
        model,
        rows=parts.data.batch_size,
        seq_len=parts.data.seq_len,
        accumulate=trainer.accumulate_grad_batches,
        devices=n_replicas(trainer),
        total_steps=parts.module.total_steps,
    )
    if trainer.is_global_zero:
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"run         {parts.run}")
        if checkpoint:
            print(describe_resume(checkpoint))
        print(f"data        {parts.data.summary()}")
        print(*describe_model(model, device), step, sep="\n")
        if adapters_of(model):
            print(*describe(model), sep="\n")
        print(f"device      {device}{threads}, precision {config.precision.lightning}, seed {config.seed}", flush=True)


def relative(path: Path) -> Path:
    """The path as a person would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def quiet() -> None:
    """Silence what Lightning and datasets say that a user cannot act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for text in (
        "does not have many workers",
        "Checkpoint directory",
        "GPU available but not",
        "treespec, LeafSpec",
        "sync_dist=True",
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")


def flatten(config: DictConfig) -> dict[str, object]:
    """What shapes the result, resolved, as one level of dotted names: what TensorBoard's HParams shows."""
    flat: dict[str, object] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)

    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    walk(
        {k: v for k, v in values.items() if k not in ("callbacks", "logger", "generation", "output_dir", "dry_run")}, ""
    )
    return flat
