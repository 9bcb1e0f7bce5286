"""Configuration becomes objects, here only: a resolved configuration in, a run folder out."""

import logging
import signal
import warnings
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from genai_pl.callbacks import MetricsCSV, step_of
from genai_pl.config import searches
from genai_pl.config_errors import given_overrides
from genai_pl.data import vocabulary
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError
from genai_pl.files import claimed
from genai_pl.fit import Parts, finish, fit
from genai_pl.loading import load
from genai_pl.masking import masked
from genai_pl.models import Model
from genai_pl.models.virtual import VirtualTokens
from genai_pl.modules import BaseModule
from genai_pl.modules.base import n_replicas
from genai_pl.modules.rl import RLModule
from genai_pl.names import Shape
from genai_pl.peft import adapters_of, describe
from genai_pl.recipes.made import check_made
from genai_pl.resume import choose_checkpoint, describe_resume
from genai_pl.rewards import load_rewards
from genai_pl.run_folder import check_goes_on, description, write_settings
from genai_pl.start import adapt, check_shape, keep_base, start
from genai_pl.strategies import float8, launched
from genai_pl.summary import describe_model, describe_rollout, describe_step
from genai_pl.sweeps import Outcome, finished
from genai_pl.targets import make, named
from genai_pl.trainer import build_trainer, connect, count_steps
from genai_pl.trust import unplain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train(config: DictConfig) -> Outcome:
    """Train as the configuration says; the exit status is 0, or 130 after Ctrl-C; the value is that of optimized_metric."""
    run = relative(Path(config.output_dir))
    goes_on = config.resume == "auto" and HydraConfig.get().mode is RunMode.MULTIRUN  # a sweep, each job in its folder
    if goes_on and (results := finished(run, config.trainer.max_steps)):
        print(f"run         {run} is finished: skipped", flush=True)
        return Outcome(0, results.get(config.optimized_metric))
    quiet()
    torch.set_float32_matmul_precision(config.precision.matmul)
    # model.attention=sdpa: cuDNN's kernel gives NaN gradients under a dense mask (pytorch/pytorch 196678, on H100)
    torch.backends.cuda.enable_cudnn_sdp(False)
    L.seed_everything(config.seed, verbose=False)
    begun = config.resume and (not goes_on or any((run / "checkpoints").glob("*.ckpt")))
    checkpoint = relative(choose_checkpoint(config.resume, run)) if begun else None
    with claimed(run) if rank_zero_only.rank == 0 else nullcontext():
        status, parts = _train(config, run, checkpoint)
    if parts.interrupt.signum == signal.SIGTERM and HydraConfig.get().mode is RunMode.MULTIRUN:
        status = 128 + signal.SIGTERM  # else the sweep would begin its next job
    return Outcome(status, optimized(config.optimized_metric, parts.trainer))


def _train(config: DictConfig, run: Path, checkpoint: Path | None) -> tuple[int, Parts]:
    settings, told = deepcopy(config), description(config)
    if checkpoint:
        check_goes_on(told, checkpoint, run)
    parts = build(config, run)
    connect(config, parts, checkpoint)
    parts.checkpoints.contents |= told
    parts.checkpoints.on_start = partial(_begin, settings, parts, checkpoint)
    announce(config, parts, checkpoint)
    with launched(parts.trainer):
        fit(parts, checkpoint)
        return finish(parts, flat=flatten(config), export=config.callbacks.export, again=retyped()), parts


@rank_zero_only
def _begin(settings: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Write what the folder says of the run, and take back what it said of steps that are made again."""
    write_settings(parts.run, settings)
    if checkpoint:
        parts.checkpoints.rewind(checkpoint)
    for logger in parts.trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.resume(step_of(checkpoint) if checkpoint else 0)


def retyped() -> list[str]:
    """The words of this command line that a run folder is not believed: a resume takes them from its own."""
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    given = [f"--config-dir={relative(Path(folder))}" for folder in folders]
    searched = [o for o in given_overrides("hydra") if o.startswith("hydra.searchpath")]
    arguments = [*given, *searched]
    return [*arguments, *unplain(given_overrides(), arguments)]


def optimized(name: str | None, trainer: L.Trainer) -> float | None:
    """The last value of the metric, for a sweeper that needs it."""
    metrics = trainer.callback_metrics
    if name in metrics:
        return float(metrics[name])
    if searches():
        known = ", ".join(sorted(k for k in metrics if k.startswith("val/"))) or "none: trainer.limit_val_batches=0"
        raise ConfigError(f"optimized_metric={name}: no such metric; validation measures {known}")
    return None


def build(config: DictConfig, run: Path) -> Parts:
    """Every object of the run."""
    check_made(config.data.path)
    data = make(config.data, seed=config.seed)
    objective = named(config.objective._target_)
    if data.kind != objective.data_kind:
        names = HydraConfig.get().runtime.choices
        raise ConfigError(f"objective={names.objective} needs data={objective.data_kind}, not data={names.data}")
    begun = start(config, data, objective)
    model, tokenizer = begun.model, begun.tokenizer
    check_shape(model, objective)
    if objective.head is not None:
        model.set_head(objective.head)
    base = keep_base(config, run, begun)
    model = adapt(config.peft, model, tokenizer)
    # virtual tokens of an adapter take their places from the text
    virtual = max((m.n_tokens for m in model.modules() if isinstance(m, VirtualTokens)), default=0)
    data.seq_len = min(data.seq_len, model.config.max_seq_len - virtual)
    module = build_module(config, model, tokenizer)
    if objective.embeds:
        module.use_sentence(begun.sentence, tokenizer)
    if objective.needs_reward:
        connect_reward(config, module, tokenizer)
    trainer, callbacks = build_trainer(config, run, samples=model.config.writes)
    data.prepare(tokenizer, module.collator)
    steps = count_steps(config, data, n_replicas(trainer))
    module.total_steps = trainer.fit_loop.epoch_loop.max_steps = steps
    data.n_batches = steps * trainer.accumulate_grad_batches
    return Parts(run, trainer, module, data, tokenizer, **callbacks, defaults=begun.defaults, base=base)


def build_module(config: DictConfig, model: Model, tokenizer: "PreTrainedTokenizerBase") -> BaseModule:
    """The LightningModule of the objective, around the model."""
    if config.precision.get("float8"):
        float8(model)
    tokens = vocabulary(tokenizer, model.config.vocab_size)
    if model.config.shape is Shape.encoder_decoder:
        tokens = tokens._replace(start=model.config.decoder_start_token_id)
    module = make(config.objective)(
        model,
        vocabulary=tokens,
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
    """Give a module that is judged in training its judges, its critic, and the clipping that Lightning leaves to it."""
    if config.trainer.accumulate_grad_batches != 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches: rollouts have minibatches instead (objective.minibatch_size)"
        )
    device = choose_device("cpu" if config.trainer.accelerator == "cpu" else "auto")
    module.reward = load_rewards(module.reward_names, module.reward_weights, policy=module.model, device=device)
    if module.critic_name is not None:
        module.use_critic(load(module.critic_name, option="objective.critic").model)
    module.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    module.clip_norm, config.trainer.gradient_clip_val = config.trainer.gradient_clip_val, None


def announce(config: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, with which attention."""
    trainer, module, model = parts.trainer, parts.module, parts.module.model
    device = trainer.strategy.root_device
    rows, counted = parts.data.batch_size, {"devices": n_replicas(trainer), "total_steps": module.total_steps}
    if isinstance(module, RLModule):
        options = {"group_size": module.group_size, "max_new_tokens": module.sampling.max_new_tokens}
        step = describe_rollout(prompts=rows, n_updates=module.n_updates(rows), **options, **counted)
    else:
        accumulate = trainer.accumulate_grad_batches
        step = describe_step(model, rows=rows, seq_len=parts.data.seq_len, accumulate=accumulate, **counted)
    if trainer.is_global_zero:
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"run         {parts.run}")
        if checkpoint:
            print(describe_resume(checkpoint))
        print(f"data        {masked(parts.data.summary())}")
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
        "FSDP2-wrapped module",
        "Detected call of `lr_scheduler.step",  # fp16 may skip the first step
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
            flat[name] = value if isinstance(value, bool | int | float) else masked(str(value))

    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    aside = {"callbacks", "logger", "generation", "output_dir", "dry_run", "plan", "optimized_metric"}
    values["tags"] = ", ".join(values["tags"])
    aside |= {name for name in ("run_name", "tags") if not values[name]}
    walk({k: v for k, v in values.items() if k not in aside}, "")
    return flat
