"""Configuration becomes objects, here only: a resolved configuration in, a run folder out."""

import logging
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

from genai_pl import signals
from genai_pl.atomic_io import claimed
from genai_pl.callbacks import MetricsCSV, step_of
from genai_pl.config.redaction import masked
from genai_pl.errors import ConfigError
from genai_pl.modules.base import n_replicas
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.peft import adapters_of, describe
from genai_pl.strategies import launched
from genai_pl.training.build import build
from genai_pl.training.fit import Parts, describe_saved, finish, fit
from genai_pl.training.hydra_job import relative, retyped, searches, sweep_of_job
from genai_pl.training.length import describe_length, warmup_of
from genai_pl.training.report import describe_model, describe_rollout, describe_step, texts_of_row
from genai_pl.training.resume import choose_checkpoint, describe_resume
from genai_pl.training.run_folder import check_goes_on, description, start_writing, write_settings
from genai_pl.training.sweeps import Outcome, finished
from genai_pl.training.trainer import connect, quiet

if TYPE_CHECKING:
    pass


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


def optimized(name: str | None, trainer: L.Trainer) -> float | None:
    """The last value of the metric, for a sweeper that needs it."""
    metrics = trainer.callback_metrics
    if name in metrics:
        return float(metrics[name])
    if searches():
        known = ", ".join(sorted(k for k in metrics if k.startswith("val/"))) or "none: trainer.limit_val_batches=0"
        raise ConfigError(f"optimized_metric={name}: no such metric; validation measures {known}")
    return None


def announce(config: DictConfig, parts: Parts, checkpoint: Path | None) -> None:
    """Print what is about to be trained, on what, for how long, with which attention."""
    trainer, module, model = parts.trainer, parts.module, parts.module.model
    device = trainer.strategy.root_device
    rows, counted = parts.data.batch_size, {"devices": n_replicas(trainer), "total_steps": module.total_steps}
    if isinstance(module, PolicyGradientModule):
        options = {"group_size": module.group_size, "max_new_tokens": module.sampling.max_new_tokens}
        step = describe_rollout(prompts=rows, n_updates=module.n_updates(rows), **options, **counted)
    else:
        accumulate = trainer.accumulate_grad_batches
        rows *= texts_of_row(module.data_kind, config.data)
        step = describe_step(model, rows=rows, seq_len=parts.data.seq_len, accumulate=accumulate, **counted)
    if trainer.is_global_zero:
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"run         {parts.run}")
        if checkpoint:
            print(describe_resume(checkpoint))
        print(f"data        {masked(parts.data.summary())}")
        print(*describe_model(model, device), step, sep="\n")
        print(describe_length(parts.length, warmup_of(module.schedule)))
        if adapters_of(model):
            print(*describe(model), sep="\n")
        print(f"device      {device}{threads}, precision {config.precision.lightning}, seed {config.seed}", flush=True)


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
