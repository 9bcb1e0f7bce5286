"""The train command: a resolved configuration in, a run folder out.

`train` prepares the process and locks the folder, `build` makes the objects, `fit` runs them. This file holds what
needs both the configuration and the built run: the lines printed before the first step, the settings written with
it, and the hyperparameters for TensorBoard.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from genai_pl import signals
from genai_pl.atomic_io import claimed
from genai_pl.callbacks import MetricsCSV, Mirror, products_dtype, step_of
from genai_pl.config.redaction import redact
from genai_pl.errors import ConfigError, TrainingError
from genai_pl.modules.base import n_replicas
from genai_pl.modules.policy_gradient import PolicyGradientModule
from genai_pl.peft import adapters_of, describe
from genai_pl.ranks import is_first_process
from genai_pl.strategies import launched
from genai_pl.training.build import build
from genai_pl.training.default_optimizer import default_line
from genai_pl.training.fit import Run, best_of, describe_saved, final_metrics, finish, fit
from genai_pl.training.hydra_job import is_search_job, job_sweep, resume_arguments, shown_path
from genai_pl.training.length import describe_length, warmup_of
from genai_pl.training.library_messages import silence_libraries
from genai_pl.training.notify import notifying
from genai_pl.training.report import describe_model, describe_rollout, describe_step, texts_of_row
from genai_pl.training.resume import TYPED_ARGUMENTS, choose_checkpoint, describe_resume
from genai_pl.training.run_folder import check_settings_unchanged, keep_run_folder, resume_constraints, write_settings
from genai_pl.training.run_report import write_run_report
from genai_pl.training.sweeps import Outcome, read_results
from genai_pl.training.trainer import checkpoint_contents
from genai_pl.training.watched_metrics import describe_watched

log = logging.getLogger(__name__)


def train(config: DictConfig) -> Outcome:
    """Train as the configuration says, in the folder `output_dir`.

    Returns the exit status, 0 or 128 + signal, and the last value of `optimized_metric` for a sweeper. With
    `resume=auto` in a sweep a finished job is skipped, and one without checkpoints starts anew.
    """
    signals.end_at_once("training had not begun, nothing was saved", grace_period=config.trainer.grace_period)
    folder = shown_path(Path(config.output_dir))
    in_sweep = config.resume == "auto" and HydraConfig.get().mode is RunMode.MULTIRUN  # a sweep, each job in its folder
    if in_sweep and (results := read_results(folder, config.trainer.max_steps)):
        print(f"run         {folder} is finished: skipped", flush=True)
        return Outcome(0, results.get(config.optimized_metric))
    # global state of torch, before any tensor exists
    silence_libraries()
    # model.attention=sdpa: cuDNN's kernel gives NaN gradients under a dense mask (pytorch/pytorch 196678, on H100)
    torch.backends.cuda.enable_cudnn_sdp(False)
    L.seed_everything(config.seed, verbose=False)
    # the checkpoint, then the run under its folder's lock
    resumes = config.resume and (not in_sweep or any((folder / "checkpoints").glob("*.ckpt")))
    checkpoint = shown_path(choose_checkpoint(config.resume, folder)) if resumes else None
    with claimed(folder) if is_first_process() else nullcontext():
        status, run = _train(config, folder, checkpoint)
    return Outcome(status, None if status else optimized(config.optimized_metric, run))


def _train(config: DictConfig, folder: Path, checkpoint: Path | None) -> tuple[int, Run]:
    """Build, announce and run; (exit status, run). The end is told to whom callbacks.notify names."""
    with notifying(config.callbacks.notify, folder) as notice:
        notice.run = run = _build(config, folder, checkpoint)
        print_summary(config, run, checkpoint)
        with launched(run.trainer), _copied(run), _reported(run):
            fit(run, checkpoint)
            sweep = job_sweep()
            options = {"export": config.callbacks.export, "arguments": resume_arguments(sweep), "sweep": sweep}
            return finish(run, flat=flatten(config), **options), run


@contextmanager
def _reported(run: Run) -> Iterator[None]:
    """Context in which a run that fails after its first step gets its report, too."""
    try:
        yield
    except Exception as error:
        if run.checkpoints.started and run.trainer.is_global_zero:
            device = run.trainer.strategy.root_device
            path = write_run_report(
                run.folder, results=final_metrics(run), best=best_of(run), device=device, error=error
            )
            if path:
                print(f"report      {path}", flush=True)
        raise


@contextmanager
def _copied(run: Run) -> Iterator[None]:
    """Context in which a run that has begun is copied to `callbacks.checkpoint.dirpath` at its end, whatever that is."""
    mirror = run.checkpoints.mirror if run.trainer.is_global_zero else None
    try:
        yield
    except BaseException:
        if mirror is not None and run.checkpoints.started:
            try:
                mirror.finish()
            except TrainingError as second:  # the first error is the one to tell
                log.warning("copy        %s", second)
        raise
    if mirror is not None:
        mirror.finish()
        print(f"copy        {redact(mirror.address)}", flush=True)


def _build(config: DictConfig, folder: Path, checkpoint: Path | None) -> Run:
    """The run, with what its checkpoints and a line about an early end hold."""
    # what must not differ between the parts of a run
    settings = resume_constraints(config)
    if checkpoint:
        check_settings_unchanged(settings, checkpoint, folder)
    if config.callbacks.checkpoint.dirpath and is_first_process():
        Mirror(folder, config.callbacks.checkpoint.dirpath).check()
    run = build(config, folder, checkpoint)

    # what is written with every checkpoint, and what a run that ends early prints
    trained_only = run.adapter_base is not None and bool(adapters_of(run.module.model))
    run.checkpoints.describe_run(
        {**checkpoint_contents(run), **settings},
        trained_only=trained_only,
        on_start=partial(_open_run_folder, config, run, checkpoint),
    )
    if trained_only:
        run.module.load_trained_only()
    sweep = job_sweep()
    run.interrupt.describe_with(partial(describe_saved, run, [*resume_arguments(sweep), f"resume={sweep or folder}"]))
    return run


@rank_zero_only
def _open_run_folder(config: DictConfig, run: Run, checkpoint: Path | None) -> None:
    """Write the settings of the run into its folder, and discard what the folder holds of steps after the
    checkpoint.

    Called when the first step begins: a run that fails before it leaves the folder as it was.
    """
    keep_run_folder(run.folder)
    if checkpoint is None or step_of(checkpoint) < run.module.total_steps:  # else no step is made by these settings
        write_settings(run.folder, config)
    if checkpoint:
        run.checkpoints.rewind(checkpoint)
    for logger in run.trainer.loggers:
        if isinstance(logger, MetricsCSV):
            logger.resume(step_of(checkpoint) if checkpoint else 0)
    if run.samples is not None:
        run.samples.resume(step_of(checkpoint) if checkpoint else -1)
    if run.checkpoints.mirror is not None:
        run.checkpoints.mirror.begin()


def optimized(name: str | None, run: Run) -> float | None:
    """Last value of the metric; None if no sweeper needs it. ConfigError in a search where validation does not
    measure it.
    """
    metrics = {**run.trainer.callback_metrics, **final_metrics(run)}
    if name in metrics:
        return float(metrics[name])
    if is_search_job():
        names = ", ".join(sorted(k for k in metrics if "val/" in k)) or "none: trainer.limit_val_batches=0"
        raise ConfigError(f"optimized_metric={name}: no such metric; validation measures {names}")
    return None


def print_summary(config: DictConfig, run: Run, checkpoint: Path | None) -> None:
    """Print the run, its data, model, attention, step, length, adapters and device: one line each, first process
    only.
    """
    trainer, module, model = run.trainer, run.module, run.module.model
    device = trainer.strategy.root_device
    batch_rows, sizes = run.data.batch_size, {"devices": n_replicas(trainer), "total_steps": module.total_steps}
    # a step in tokens, or a rollout in completions
    if isinstance(module, PolicyGradientModule):
        options = {"group_size": module.group_size, "max_new_tokens": module.sampling.max_new_tokens}
        options["max_turns"] = module.max_turns if module.environment_name else None
        step = describe_rollout(prompts=batch_rows, n_updates=module.n_updates(batch_rows), **options, **sizes)
    else:
        accumulate = trainer.accumulate_grad_batches
        batch_rows *= texts_of_row(module.data_kind, config.data)
        step = describe_step(model, rows=batch_rows, seq_len=run.data.seq_len, accumulate=accumulate, **sizes)
    if trainer.is_global_zero:
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"run         {run.folder}")
        if checkpoint:
            print(describe_resume(checkpoint))
        print(f"data        {redact(run.data.summary())}")
        dtype = products_dtype(run.precision.lightning)
        options = {"dtype": dtype, "seq_len": run.data.seq_len, "probes": device.type == "cuda"}
        print(*describe_model(model, device, **options), step, sep="\n")
        print(describe_length(run.length, warmup_of(module.schedule)))
        if line := default_line(config.optimizer.lr, HydraConfig.get().runtime.choices.optimizer, TYPED_ARGUMENTS):
            print(line)
        if adapters_of(model):
            print(*describe(model), sep="\n")
        exports_best = config.callbacks.export == "best"
        for line in describe_watched(run.best, run.early_stop, exports=exports_best):
            print(line)
        precision, reason = run.precision.lightning, run.precision.reason and f" (auto: {run.precision.reason})"
        print(f"device      {device}{threads}, precision {precision}{reason}, seed {config.seed}", flush=True)


def flatten(config: DictConfig) -> dict[str, object]:
    """Options that shape the result as one level of dotted names, for TensorBoard's HParams table; secrets
    redacted.
    """
    flat: dict[str, object] = {}

    def walk(value: object, name: str) -> None:
        """Add the leaves of a nested value."""
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        else:
            flat[name] = value if isinstance(value, bool | int | float) else redact(str(value))

    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    left_out = {"callbacks", "logger", "generation", "eval", "output_dir", "dry_run", "plan", "optimized_metric"}
    values["tags"] = ", ".join(values["tags"])
    if values["data"].get("sources"):
        values["data"]["path"] = ", ".join(f"{name}: {s['path']}" for name, s in values["data"]["sources"].items())
    left_out |= {name for name in ("run_name", "tags") if not values[name]}
    walk({k: v for k, v in values.items() if k not in left_out}, "")
    return flat
