"""Configuration becomes objects, here only: a resolved configuration in, a run folder out."""

import logging
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
from omegaconf import DictConfig

from genai_pl import signals
from genai_pl.callbacks import MetricsCSV, step_of
from genai_pl.config import searches
from genai_pl.config_errors import given_overrides
from genai_pl.data import vocabulary
from genai_pl.devices import choose_device
from genai_pl.errors import ConfigError
from genai_pl.files import claimed
from genai_pl.fit import Parts, describe_saved, finish, fit
from genai_pl.length import begun_length, check_length, passed_line, with_warmup
from genai_pl.loading import load
from genai_pl.models import Model
from genai_pl.models.checkpoint import MARK, read_contents
from genai_pl.modules import BaseModule
from genai_pl.modules.base import n_replicas
from genai_pl.modules.rl import RLModule
from genai_pl.names import Shape
from genai_pl.recipes.made import check_made
from genai_pl.report import announce, flatten
from genai_pl.resume import choose_checkpoint
from genai_pl.rewards import load_rewards
from genai_pl.run_folder import check_goes_on, description, start_writing, write_settings
from genai_pl.start import adapt, check_loaded, check_shape, fit_rows, keep_base, say_unused, start, typed_now
from genai_pl.strategies import float8, launched
from genai_pl.sweeps import Outcome, finished, saved_overrides
from genai_pl.targets import make, named
from genai_pl.trainer import build_trainer, connect, run_length
from genai_pl.trust import ASIDE, key_of, unplain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def train(config: DictConfig) -> Outcome:
    """Train as the configuration says; status 0, or that of the signal which ended the run; the value of optimized_metric."""
    signals.end_at_once("training had not begun, nothing was saved", grace_period=config.trainer.grace_period)
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
    return Outcome(status, None if status else optimized(config.optimized_metric, parts.trainer))


def _train(config: DictConfig, run: Path, checkpoint: Path | None) -> tuple[int, Parts]:
    settings, told = deepcopy(config), description(config)
    if checkpoint:
        check_goes_on(told, checkpoint, run)
    parts = build(config, run, checkpoint)
    connect(config, parts, checkpoint)
    parts.checkpoints.contents |= told
    sweep = sweep_of_job()
    again = retyped(sweep)
    parts.interrupt.describe = partial(describe_saved, parts, [*again, f"resume={sweep or run}"])
    parts.checkpoints.on_start = partial(_begin, settings, parts, checkpoint)
    announce(config, parts, checkpoint)
    with launched(parts.trainer):
        fit(parts, checkpoint)
        return finish(parts, flat=flatten(config), export=config.callbacks.export, again=again, whole=sweep), parts


@rank_zero_only
def _begin(settings: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Write what the folder says of the run, and take back what it said of steps that are made again."""
    start_writing(parts.run)
    if checkpoint is None or step_of(checkpoint) < parts.module.total_steps:  # else no step is made by these settings
        write_settings(parts.run, settings)
    if checkpoint:
        parts.checkpoints.rewind(checkpoint)
    for logger in parts.trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.resume(step_of(checkpoint) if checkpoint else 0)


def sweep_of_job() -> Path | None:
    """The sweep that this run is a job of; None for that of a search, which goes on by a storage of its own."""
    hydra = HydraConfig.get()
    return relative(Path(hydra.sweep.dir)) if hydra.mode is RunMode.MULTIRUN and not searches() else None


def retyped(sweep: Path | None) -> list[str]:
    """The words of this command line that the folder of a run, or sweep, is not believed: a resume takes them from its own."""
    hydra = HydraConfig.get()
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    given = [f"--config-dir={relative(Path(folder))}" for folder in folders]
    searched = [o for o in given_overrides("hydra") if o.startswith("hydra.searchpath")]
    arguments = [*given, *searched]
    if sweep is None:
        return [*arguments, *unplain(given_overrides(), arguments)]
    saved = [o for o in saved_overrides(sweep) if key_of(o) not in {*ASIDE, "hydra.searchpath"}]
    return ["-m", *arguments, *unplain(saved, arguments)]


def optimized(name: str | None, trainer: L.Trainer) -> float | None:
    """The last value of the metric, for a sweeper that needs it."""
    metrics = trainer.callback_metrics
    if name in metrics:
        return float(metrics[name])
    if searches():
        known = ", ".join(sorted(k for k in metrics if k.startswith("val/"))) or "none: trainer.limit_val_batches=0"
        raise ConfigError(f"optimized_metric={name}: no such metric; validation measures {known}")
    return None


def build(config: DictConfig, run: Path, checkpoint: Path | None = None) -> Parts:
    """Every object of the run, which goes on from the checkpoint if there is one."""
    check_made(config.data.path)
    lengths = {name: config.trainer[name] for name in ("max_steps", "max_epochs")}
    check_length(**lengths, warmup_steps=config.scheduler.get("warmup_steps"))
    typed = typed_now(config)
    say_unused(config, typed)
    data = make(config.data, seed=config.seed)
    objective = named(config.objective._target_)
    if data.kind != objective.data_kind:
        names = HydraConfig.get().runtime.choices
        raise ConfigError(f"objective={names.objective} needs data={objective.data_kind}, not data={names.data}")
    begun = start(config, data, objective)
    model, tokenizer = begun.model, begun.tokenizer
    if config.init_from or "name" in config.model:
        check_loaded(config, model.config, tokenizer, typed)
    check_shape(config, model.config, objective)
    if objective.head is not None:
        model.set_head(objective.head)
    base = keep_base(config, run, begun)
    model = adapt(config.peft, model, tokenizer)
    rows, data.seq_len, clamped = fit_rows(config, model)
    data.batch_size, data.val_batch_size = rows, config.data.val_batch_size or rows
    if clamped:
        rank_zero_only(log.info)("clamped     %s", clamped)
    module = build_module(config, model, tokenizer)
    if objective.embeds:
        module.use_sentence(begun.sentence, tokenizer)
    if objective.needs_reward:
        connect_reward(config, module, tokenizer)
    trainer, callbacks = build_trainer(config, run, samples=model.config.writes)
    data.prepare(tokenizer, module.collator)
    contents = None if checkpoint is None else read_contents(checkpoint)
    before = None if contents is None else begun_length(contents[MARK])
    length = run_length(config, data, module, n_replicas(trainer), before)
    epochs = config.trainer.max_epochs
    if before and (line := passed_line(length, contents["global_step"], before, max_epochs=epochs)):
        log.warning(line)
    module.total_steps = trainer.fit_loop.epoch_loop.max_steps = length.steps
    module.schedule = with_warmup(module.schedule, length.steps, before)
    module.schedule(0, total_steps=length.steps)  # its mistakes are told before the first step
    data.n_batches = length.steps * trainer.accumulate_grad_batches
    return Parts(run, trainer, module, data, tokenizer, length, **callbacks, defaults=begun.defaults, base=base)


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
        "callbacks used to create the checkpoint",  # those whose loss matters refuse it themselves
        "FSDP2-wrapped module",
        "but AMP with fp16 is not supported on CPU",  # refused
        "Detected call of `lr_scheduler.step",  # fp16 may skip the first step
    ):
        warnings.filterwarnings("ignore", f".*{text}.*")
