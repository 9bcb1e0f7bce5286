"""The Trainer of a run: Lightning's arguments from the group `trainer`, our callbacks, loggers and strategy.

Lightning counts batches and epochs, this project optimizer steps: validation, checkpoints and the end are given in
steps, and the data module never ends an epoch early. Arguments of Lightning that would contradict this are refused
with the option to use instead (REFUSED_ARGUMENTS).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from omegaconf import DictConfig, OmegaConf

from genai_pl import callbacks as cb
from genai_pl.config.generation import GenerationConfig
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.tokenizer import tokenizer_files
from genai_pl.errors import ConfigError
from genai_pl.models import flop_rates
from genai_pl.modules import BaseModule
from genai_pl.peft import adapters_of
from genai_pl.strategies import (
    RankLauncher,
    ShardedStrategy,
    ZeroStrategy,
    choose_environment,
    follow_launcher,
    recompute,
    started_devices,
)
from genai_pl.training.attention import attention_probe
from genai_pl.training.benchmarks import build_benchmarks
from genai_pl.training.compilation import compile_probe
from genai_pl.training.fit import Run
from genai_pl.training.hydra_job import rank_command
from genai_pl.training.length import (
    Length,
    choose_length,
    warmup_of,
)
from genai_pl.training.output_folders import register_early_output
from genai_pl.training.pipeline_rules import check_schedule
from genai_pl.training.precision import Precision
from genai_pl.training.run_report import SAMPLES
from genai_pl.training.targets import instantiate
from genai_pl.training.watched_metrics import choose_best, choose_early_stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

OWN_FIELDS = (
    "recompute",
    "recompute_every",
    "optimizer_in_backward",
    "grace_period",
)  # fields of `trainer` that Lightning does not know
REFUSED_ARGUMENTS = {  # arguments of Lightning's Trainer that are decided elsewhere, or void here
    **{name: f"set {name}=" for name in ("precision", "strategy", "logger")},
    "callbacks": "add to callbacks.extra",
    "plugins": "ours write the checkpoints",
    "default_root_dir": "set output_dir=",
    "check_val_every_n_epoch": "trainer.val_check_interval counts steps",
    "num_sanity_val_steps": "trainer.val_check_interval says when is validated",
    "min_steps": "trainer.max_steps is the length, and what stops a run stops it at once",
    "min_epochs": "trainer.max_epochs is the length, and what stops a run stops it at once",
    "fast_dev_run": "set trainer.max_steps=1 and trainer.limit_val_batches=1",
    "enable_checkpointing": "callbacks.checkpoint says what is kept",
    "enable_model_summary": "what is trained is printed already",
    "use_distributed_sampler": "the data are divided already",
    "gradient_clip_algorithm": "trainer.gradient_clip_val is of the norm",
    "limit_test_batches": "nothing is tested: evaluate.py",
    "limit_predict_batches": "nothing is predicted: generate.py",
}


def build_trainer(
    config: DictConfig,
    folder: Path,
    *,
    precision: Precision,
    module: BaseModule,
    data: RowsDataModule,
    tokenizer: "PreTrainedTokenizerBase",
    stored: Mapping[str, object],
) -> tuple[L.Trainer, dict[str, L.Callback]]:
    """The Trainer, and our callbacks by their names in `Run`; ConfigError for arguments that Lightning refuses.

    folder: the run folder. precision: what products are computed in. module, data, tokenizer: for callbacks that sample
    text and count FLOPs. stored: what the checkpoint of a resumed run holds of ours; empty for a new one.
    """
    follow_launcher()
    # the options of `trainer`, without those that Lightning does not know or that have no effect
    options = OmegaConf.to_container(config.trainer, resolve=True)
    log_every = options.pop("log_every_n_steps")
    for name in OWN_FIELDS:
        del options[name]
    for name in options.keys() & REFUSED_ARGUMENTS:
        raise ConfigError(f"trainer.{name}={options[name]}: has no effect: {REFUSED_ARGUMENTS[name]}; leave it out")
    options |= started_devices(options)
    if not module.automatic_optimization:
        options["gradient_clip_val"] = None  # the module clips by itself
    strategy = instantiate(config.strategy) if "_target_" in config.strategy else config.strategy.lightning
    # options count optimizer steps, across epochs; Lightning counts batches
    options["val_check_interval"] *= options["accumulate_grad_batches"]
    options |= {"check_val_every_n_epoch": None, "log_every_n_steps": 1, "max_steps": -1, "max_epochs": -1}
    loggers = OmegaConf.to_container(config.logger, resolve=True) if config.logger else []
    callbacks = build_callbacks(
        config, folder, strategy, log_every=log_every, module=module, data=data, tokenizer=tokenizer
    )
    # callbacks of the user, which are instantiated like any target
    for name, entry in config.callbacks.extra.items():
        # Lightning checks its arguments in many places and ways
        if not isinstance(entry, DictConfig) or "_target_" not in entry:
            raise ConfigError(f"callbacks.extra.{name}: no callback, for it has no _target_ that names its class")
    extra_callbacks = [*instantiate(config.callbacks.extra).values(), *([cb.Profile(folder)] if config.profile else [])]
    extra_callbacks += [cb.ConfusionPicture()] if module.labelled else []
    # attention first: the compiled block has its choice
    probes: list[L.Callback] = [
        attention_probe(config, precision, module, data, callbacks, stored=stored.get("attention"))
    ]
    compiling = compile_probe(config, strategy, precision, module, data, callbacks, stored=stored.get("compile"))
    probes += [compiling] if compiling else []
    try:
        trainer = L.Trainer(
            **options,
            precision=precision.lightning,
            strategy=strategy,
            logger=[instantiate(node, at="logger") for node in loggers],
            callbacks=[*callbacks.values(), cb.Divergence(), *probes, *extra_callbacks],
            plugins=[cb.AtomicCheckpointIO(callbacks["checkpoints"].written), choose_environment()],
            default_root_dir=str(folder),
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:  # Lightning's checks of its own arguments
        raise ConfigError(f"trainer: {str(error).splitlines()[0]}") from None
    if precision.lightning in ("16", "16-mixed") and isinstance(trainer.accelerator, CPUAccelerator):
        raise ConfigError("precision=fp16 needs a GPU: on a CPU Lightning takes bf16 instead; precision=bf16")
    # two replacements that Lightning has no argument for: signals, and the command line of further ranks
    trainer._signal_connector = NoSignals(trainer)
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = RankLauncher(trainer.strategy.launcher, rank_command(config, precision))
    return trainer, callbacks


def build_callbacks(
    config: DictConfig,
    folder: Path,
    strategy: object,
    *,
    log_every: int,
    module: BaseModule,
    data: RowsDataModule,
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, L.Callback]:
    """Our callbacks by their names in `Run`; `samples` only where one process can write text.

    log_every: optimizer steps between logged values. FLOPs and prompts are functions, because data are not read
    yet.
    """
    settings, model, console = config.callbacks, module.model, cb.Console()
    callbacks = {
        "monitor": cb.Monitor(
            log_every, flops=lambda: flop_rates(model, model.config, data.seq_len), listeners=[console.show]
        ),
        "console": console,
        "interrupt": cb.Interrupt(),
    }
    # benchmarks: text is read and written by one process, which must hold the whole model for a while
    gathers = getattr(strategy, "gathers", True)
    spent = callbacks["monitor"].leave_out
    benchmarks = build_benchmarks(config, model, tokenizer, gathers=gathers, say=console.say, spent=spent)
    # checkpoints, the best of them, and an early end
    intervals = {name: settings.checkpoint[name] for name in ("every_n_steps", "every_n_minutes", "keep")}
    measured = {} if benchmarks is None else benchmarks.metric_names
    best, stop = choose_best(config, folder / "checkpoints", measured), choose_early_stop(config, measured)
    watches = {name: watch for name, watch in {"best": best, "early_stop": stop}.items() if watch}
    callbacks |= watches
    address = settings.checkpoint.dirpath
    kept = {"best": best, "mirror": None if address is None else cb.Mirror(folder, address)}
    callbacks["checkpoints"] = cb.StepCheckpoint(str(folder / "checkpoints"), **intervals, **kept)
    wants_samples = model.config.writes and settings.samples.every_n_steps
    if wants_samples and gathers:
        prompts = list(settings.samples.prompts or ())
        callbacks["samples"] = cb.Samples(
            every_n_steps=settings.samples.every_n_steps,
            prompts=lambda: prompts or [module.make_prompt(data.prompt())],
            config=GenerationConfig(**{**config.generation, "max_new_tokens": settings.samples.max_new_tokens}),
            tokenizer=tokenizer,
            file=folder / SAMPLES,
            say=console.say,
            spent=spent,
        )
    if benchmarks is not None:
        benchmarks.watches = [watch for watch in watches.values() if watch.of_benchmarks]
        callbacks["benchmarks"] = benchmarks
    if wants_samples and not gathers:
        log.info("samples     none: no process holds the whole model (strategy=%s)", type(strategy).__name__)
    return callbacks


class NoSignals(_SignalConnector):
    """Stand-in for Lightning's signal handlers, which communicate from inside a handler and requeue Slurm jobs."""

    def register_signal_handlers(self) -> None:
        """Install nothing: genai_pl.signals owns the handlers."""


def choose_run_length(
    config: DictConfig,
    data: RowsDataModule,
    module: BaseModule,
    world_size: int,
    stored: Mapping[str, int | None] | None,
) -> Length:
    """Length of the run in optimizer steps, from options, data and module.

    world_size: replicas that each read their own rows. stored: the length in the checkpoint of a resumed run,
    None otherwise.
    """
    accumulate, options = config.trainer.accumulate_grad_batches, config.trainer
    batches = None if data.streaming else data.steps_per_epoch(accumulate, world_size)
    trained = bool(config.init_from) or "name" in config.model
    return choose_length(
        max_steps=options.max_steps,
        max_epochs=options.max_epochs,
        steps_per_pass=None if batches is None else batches * module.n_updates(data.batch_size),
        fine_tunes=trained and data.kind != "text",
        stored=stored,
    )


def limit_steps(trainer: L.Trainer, steps: int) -> None:
    """End the Trainer after `steps` optimizer steps. Its argument max_steps comes too early: it would be needed
    before the data.
    """
    trainer.fit_loop.epoch_loop.max_steps = steps


def checkpoint_contents(run: Run) -> dict[str, object]:
    """What a checkpoint of the run holds besides Lightning's state: model, tokenizer, length, adapter and the name
    of its base.

    This makes a single .ckpt loadable without its run folder.
    """
    contents: dict[str, object] = {
        "model": run.module.model.config.to_dict(),
        "tokenizer": tokenizer_files(run.tokenizer),
        "defaults": {name: dict(values) for name, values in run.defaults._asdict().items()},
        "precision": run.precision.lightning,
        "length": {"steps": run.length.steps, "warmup_steps": warmup_of(run.module.schedule)},
    }
    if files := {name: values for name, values in run.module.export_files().items() if name.endswith(".json")}:
        contents["files"] = files
    for adapter in adapters_of(run.module.model):
        contents |= {"peft": {"method": adapter.method, "options": adapter.options}, "base": run.adapter_base}
    return contents


def prepare_loggers(trainer: L.Trainer, checkpoint: Path | None) -> None:
    """Let TensorBoard write into the run folder, and hide its events of steps after the checkpoint."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        register_early_output(Path(logger.log_dir))
        if checkpoint:
            logger._kwargs["purge_step"] = cb.step_of(checkpoint) + 1


def prepare_strategy(config: DictConfig, run: Run) -> None:
    """Connect strategy and module, and apply what trades time for memory; ConfigError for options that exclude
    each other.
    """
    strategy = run.trainer.strategy
    strategy.connect(run.module)
    if isinstance(strategy, (ShardedStrategy, ZeroStrategy)):
        strategy.check(run.module, rows=run.data.batch_size)
        check_schedule(config)
    if config.trainer.optimizer_in_backward:
        check_in_backward(config, run)
        run.module.step_in_backward()
    kind, every = config.trainer.recompute, config.trainer.recompute_every
    if kind is not None or every is not None:
        recompute(run.module.model, 1 if every is None else every, kind=kind or "full")


def check_in_backward(config: DictConfig, run: Run) -> None:
    """ConfigError for what needs all gradients of a step at once, while each parameter is updated inside of
    backward (Lv et al. 2023) and its gradient freed.
    """
    name, options, trainer = "trainer.optimizer_in_backward=true", config.trainer, run.trainer
    if not run.module.automatic_optimization:
        raise ConfigError(f"{name}: an objective that writes while it trains steps by itself")
    if options.gradient_clip_val is not None:
        raise ConfigError(f"{name} cannot clip the norm of all gradients: set trainer.gradient_clip_val=null")
    if options.accumulate_grad_batches != 1:
        raise ConfigError(f"{name} keeps no gradients to add to: set trainer.accumulate_grad_batches=1")
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigError(f"{name} cannot skip a step that has begun: precision=bf16, not fp16")
    if trainer.world_size > 1 or isinstance(trainer.strategy, (ShardedStrategy, ZeroStrategy)):
        raise ConfigError(f"{name} is for one process: with several, strategy=fsdp divides gradients")
