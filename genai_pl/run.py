"""Configuration becomes objects, here only: a resolved configuration in, a run folder out."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from genai_pl import callbacks as cb
from genai_pl.data import add_missing, byte_tokenizer, pretrained_tokenizer, vocabulary
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.tokenizer import files_of
from genai_pl.errors import ConfigError, UserError
from genai_pl.fit import Parts, finish, fit
from genai_pl.load import load
from genai_pl.models import Model, ModelConfig, build_model, flop_rates
from genai_pl.modules import BaseModule
from genai_pl.resume import choose_checkpoint, describe_resume
from genai_pl.specs import GenerationConfig
from genai_pl.summary import describe_model, describe_step

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
    fit(parts, checkpoint)
    return finish(parts, flat=flatten(config), export=config.callbacks.export)


def build(config: DictConfig, run: Path) -> Parts:
    """Every object of the run."""
    data = make(config.data, seed=config.seed)
    objective = get_class(config.objective._target_)
    if data.kind != objective.data_kind:
        names = HydraConfig.get().runtime.choices
        raise ConfigError(f"objective={names.objective} needs data={objective.data_kind}, not data={names.data}")
    if config.init_from:
        loaded = load(config.init_from, **{k: config.model[k] for k in ("attention", "dropout")})
        model, tokenizer = loaded.model.train(), loaded.tokenizer
        add_missing(tokenizer, objective.needs)
        if len(tokenizer) > model.config.vocab_size:
            raise ConfigError(
                f"init_from={config.init_from}: its tokenizer lacks tokens that the objective needs, and its vocabulary "
                f"of {model.config.vocab_size} has no room for them; choose another objective or model"
            )
        data.seq_len = min(data.seq_len, model.config.max_seq_len)
    else:
        tokenizer = build_tokenizer(config, data)
        add_missing(tokenizer, objective.needs)
        model = build_model(model_config(config, len(tokenizer)))
    if not objective.uses_head:
        model.drop_head()
    module = build_module(config, model, tokenizer)
    trainer, callbacks = build_trainer(config, run, samples=model.config.writes)
    data.prepare(tokenizer, module.collator)
    steps = count_steps(config, data, trainer.world_size)
    module.total_steps = trainer.fit_loop.epoch_loop.max_steps = steps
    data.n_batches = steps * trainer.accumulate_grad_batches
    return Parts(run, trainer, module, data, tokenizer, **callbacks)


def make(node: DictConfig, **given: object) -> Any:
    """The object that a node's `_target_` names; a mistake of the user keeps its own line."""
    try:
        return instantiate(node, **given)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


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


def build_trainer(config: DictConfig, run: Path, *, samples: bool) -> tuple[L.Trainer, dict[str, L.Callback]]:
    """The Trainer and our callbacks by name."""
    options = OmegaConf.to_container(config.trainer, resolve=True)
    every = options.pop("log_every_n_steps")
    # ours count optimizer steps, across epochs; Lightning counts batches
    options["val_check_interval"] *= options["accumulate_grad_batches"]
    options |= {"check_val_every_n_epoch": None, "log_every_n_steps": 1, "max_steps": -1, "max_epochs": -1}
    settings = config.callbacks
    loggers = OmegaConf.to_container(config.logger, resolve=True) if config.logger else []
    callbacks = {
        "monitor": cb.Monitor(every),
        "console": cb.Console(),
        "interrupt": cb.Interrupt(),
        "checkpoints": cb.StepCheckpoint(str(run / "checkpoints"), **settings.checkpoint),
    }
    if samples and settings.samples.every_n_steps:
        sampling = GenerationConfig(**{**config.generation, "max_new_tokens": settings.samples.max_new_tokens})
        prompts = list(settings.samples.prompts or ())
        callbacks["samples"] = cb.Samples(
            every_n_steps=settings.samples.every_n_steps, prompts=prompts, config=sampling
        )
    try:
        trainer = L.Trainer(
            **options,
            precision=config.precision.lightning,
            strategy=config.strategy.lightning,
            logger=[make(node) for node in loggers],
            callbacks=[*callbacks.values(), *make(config.callbacks.extra).values()],
            plugins=[cb.AtomicCheckpointIO()],
            default_root_dir=str(run),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:  # Lightning's checks of its own arguments
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from None
    return trainer, callbacks


def count_steps(config: DictConfig, data: RowsDataModule, world_size: int) -> int:
    """Optimizer steps of the run, from our own numbers: max_epochs wins over max_steps."""
    if config.trainer.max_epochs is None:
        if config.trainer.max_steps < 1:
            raise ConfigError(f"trainer.max_steps={config.trainer.max_steps}: set it, or trainer.max_epochs")
        return config.trainer.max_steps
    if data.streaming:
        raise ConfigError("data.streaming=true has no epochs: set trainer.max_steps, not trainer.max_epochs")
    return config.trainer.max_epochs * data.steps_per_epoch(config.trainer.accumulate_grad_batches, world_size)


def connect(config: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Tell the callbacks and loggers about each other and about what is trained."""
    model, monitor = parts.module.model, parts.monitor
    monitor.flops = flop_rates(model, model.config, parts.data.seq_len)
    monitor.listeners.append(parts.console.show)
    parts.checkpoints.contents = {"model": model.config.to_dict(), "tokenizer": files_of(parts.tokenizer)}
    if parts.samples:
        parts.samples.tokenizer, parts.samples.say = parts.tokenizer, parts.console.say
        parts.samples.prompts = parts.samples.prompts or [parts.module.make_prompt(parts.data.prompt())]
    step = cb.step_of(checkpoint) if checkpoint else 0
    for logger in parts.trainer.loggers:
        if isinstance(logger, cb.MetricsCSV):
            logger.resume(step)
        if isinstance(logger, TensorBoardLogger) and checkpoint:
            logger._kwargs["purge_step"] = step + 1
    parts.trainer.strategy.connect(parts.module)


def announce(config: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, with which attention."""
    trainer, model = parts.trainer, parts.module.model
    device = trainer.strategy.root_device
    step = describe_step(
        model,
        rows=parts.data.batch_size,
        seq_len=parts.data.seq_len,
        accumulate=trainer.accumulate_grad_batches,
        devices=trainer.world_size,
        total_steps=parts.module.total_steps,
    )
    if trainer.is_global_zero:
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"run         {parts.run}")
        if checkpoint:
            print(describe_resume(checkpoint))
        print(f"data        {parts.data.summary()}")
        print(*describe_model(model, device), step, sep="\n")
        print(f"device      {device}{threads}, precision {config.precision.lightning}, seed {config.seed}", flush=True)


def relative(path: Path) -> Path:
    """The path as a person would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def quiet() -> None:
    """Silence what Lightning and datasets say that a user cannot act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("datasets").setLevel(logging.ERROR)
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
