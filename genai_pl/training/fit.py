"""Fitting: the run from its first step to its end, whatever the end is: done, a signal, a full disk, a loss that is
NaN.

A run must end with something usable and a line that says how to go on. Errors of the machine become one line with
the last good checkpoint; errors of the code keep their traceback. On a signal the current step is finished and
saved (callbacks/interrupt.py), then the process exits with 128 + n.
"""

import logging
import re
import shlex
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger

from genai_pl.atomic_io import write_atomic
from genai_pl.callbacks import (
    Benchmarks,
    BestCheckpoint,
    Console,
    EarlyStop,
    Interrupt,
    Monitor,
    Samples,
    StepCheckpoint,
)
from genai_pl.checkpoints.file import read_checkpoint
from genai_pl.config.redaction import redact
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.generation_defaults import GENERATION, NO_DEFAULTS, GenerationDefaults, generation_config_values
from genai_pl.data.tokenizer import save_tokenizer
from genai_pl.errors import CheckpointError, ConfigError, LossError, TrainingError, system_error, system_line
from genai_pl.exporting import adapter_card, export_model, read_alike, token_ids, write_files
from genai_pl.models.hf.config import NATIVE
from genai_pl.models.hf.folder import write_json
from genai_pl.modules import BaseModule
from genai_pl.peft import adapters_of, save_adapter
from genai_pl.signals import exit_status
from genai_pl.strategies import ShardedStrategy, ZeroStrategy
from genai_pl.training.length import Length
from genai_pl.training.precision import Precision
from genai_pl.training.report import describe_seconds, final_lines
from genai_pl.training.run_report import write_run_report
from genai_pl.training.sweeps import write_results
from genai_pl.training.trust import PER_COMMAND, key_of, read_overrides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """All objects of one run, complete when built.

    folder: the run folder. trainer, module, data, tokenizer: what Lightning fits. length: optimizer steps and
    passes.
    monitor, console, interrupt, checkpoints, best, early_stop, samples, benchmarks: our callbacks; samples is None
    where no text can be written, best, early_stop and benchmarks where they are not asked for.
    defaults: generation settings of the folder that the model came from. adapter_base: reference to an adapter's base
    model, None without. precision: what products are computed in, and why.
    """

    folder: Path
    trainer: L.Trainer
    module: BaseModule
    data: RowsDataModule
    tokenizer: "PreTrainedTokenizerBase"
    length: Length
    precision: Precision
    monitor: Monitor
    console: Console
    interrupt: Interrupt
    checkpoints: StepCheckpoint
    best: BestCheckpoint | None = None
    early_stop: EarlyStop | None = None
    samples: Samples | None = None
    benchmarks: Benchmarks | None = None
    defaults: GenerationDefaults = NO_DEFAULTS  # of the folder that the model came from
    adapter_base: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end: its last step, or an early stop."""
        stopped = self.early_stop is not None and self.early_stop.stopped
        return (stopped or self.trainer.global_step >= self.module.total_steps) and not self.interrupt.left_out


def fit(run: Run, checkpoint: Path | None) -> None:
    """Train to the end or to the first signal; validate once more if the last step was not validated.

    checkpoint: where a resumed run goes on, None for a new one.
    """
    with _one_line_errors(run):
        with _restore_errors(run, checkpoint):
            run.trainer.fit(run.module, run.data, ckpt_path=checkpoint, weights_only=True)
        # resumed at its end: no step is left to make
        if not run.checkpoints.started:
            run.checkpoints.begin()
            log.info("finished    already at step %d of %d", run.trainer.global_step, run.module.total_steps)
        _validate_the_end(run)
        if not run.interrupt.left_out and run.trainer.is_global_zero:
            run.checkpoints.confirm()
    # on a signal, print what was saved
    if run.interrupt.left_out and run.trainer.is_global_zero:
        name, step, last = (
            signal.Signals(run.interrupt.signum).name,
            run.trainer.global_step,
            run.checkpoints.last,
        )
        log.warning("stopped     by %s at step %d of %d, saved in %s", name, step, run.module.total_steps, last)


def _validate_the_end(run: Run) -> None:
    """Validate once more if the last step was not, unless any rank has received a signal: all ranks must agree, or
    one would wait.
    """
    run.interrupt.begin()
    trainer, module = run.trainer, run.module
    if run.interrupt.left_out or module.validated_at == trainer.global_step or not trainer.limit_val_batches:
        return
    if run.interrupt.agree(trainer):
        run.interrupt.left_out = True
    else:
        trainer.validate(module, run.data, verbose=False)


def describe_saved(run: Run, arguments: list[str]) -> str:
    """End of the message of a stopped run: where it is saved, and the command that goes on with it."""
    last = run.checkpoints.last
    return (
        f"saved in {last}; python train.py {shlex.join(arguments)}"
        if last.exists()
        else "no checkpoint was written yet"
    )


def final_metrics(run: Run) -> dict[str, float]:
    """Metrics of the last validation and of benchmarks, and as `best/...` those of the best validation with its step."""
    metrics = {k: float(v) for k, v in run.trainer.callback_metrics.items() if k.startswith("val/")}
    metrics |= {} if run.benchmarks is None else run.benchmarks.metrics
    if run.best is not None and run.best.best is not None:
        metrics |= {"best/step": run.best.best.step, **{f"best/{k}": v for k, v in run.best.metrics.items()}}
    return metrics


def finish(
    run: Run, *, flat: dict[str, object], export: bool | str, arguments: Iterable[str] = (), sweep: Path | None = None
) -> int:
    """Log the end, export, print where everything is and how to go on; the exit status.

    flat: options for TensorBoard. export: whether to write the trained model, "best": that of the best checkpoint.
    arguments, sweep: as of `final_lines`.
    """
    metrics = final_metrics(run)
    with _one_line_errors(run):
        # hyperparameters with the metrics that they led to
        for logger in run.trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and metrics:
                logger.log_hyperparams(flat, metrics, step=run.trainer.global_step)
            logger.finalize("success")
        # a sharded model is gathered by all ranks, then written by one
        if export and isinstance(run.trainer.strategy, (ShardedStrategy, ZeroStrategy)):
            run.trainer.strategy.gather()
        if export and run.trainer.is_global_zero:
            step = load_best(run) if export == "best" else run.trainer.global_step
            of_weights = run.best.metrics if export == "best" and run.best.metrics else metrics
            export_run(run, _card(run, flat, of_weights, step))
        done = run.finished
        if done and run.trainer.is_global_zero:
            early = run.trainer.global_step < run.module.total_steps
            write_results(run.folder, run.trainer.global_step, metrics, stopped_early=early)
    # what is there, and what to type next
    if run.trainer.is_global_zero:
        options = run.module.generate_options(run.data.prompt(), run.tokenizer.mask_token)
        name = ("adapter" if adapters_of(run.module.model) else "model") if export else None
        samples = 0.0 if run.samples is None else run.samples.seconds
        measured = {} if run.benchmarks is None else {"benchmarks": run.benchmarks.seconds}
        seconds = {**run.monitor.seconds, "checkpoints": run.checkpoints.seconds, "samples": samples, **measured}
        print(*run.data.mixture_lines(), describe_seconds(**seconds), sep="\n")
        reported = write_run_report(
            run.folder, results=metrics, best=best_of(run), device=run.trainer.strategy.root_device
        )
        best = None if run.best is None else f"{run.best.path} ({run.best.describe()})"
        words = {"generate": options, "arguments": arguments, "sweep": sweep, "best": best}
        lines = final_lines(run.folder, exported=name, finished=done, report=reported, **words)
        print(*lines, sep="\n", flush=True)
    return exit_status(run.interrupt.signum) if run.interrupt.left_out else 0


def best_of(run: Run) -> tuple[str, int, float] | None:
    """Metric, step and value of the best validation; None where none is kept or found."""
    return None if run.best is None or run.best.best is None else (run.best.metric, *run.best.best)


def load_best(run: Run) -> int:
    """Put the weights of the best checkpoint into the model, which one process holds in full; returns their step.

    Those of the last step stay where no validation has found a best one yet.
    """
    best = run.best.best
    if best is None or best.step == run.trainer.global_step:
        return run.trainer.global_step
    stored = read_checkpoint(run.best.path)["state_dict"]
    own = dict(run.module.named_parameters(remove_duplicate=False)) | dict(
        run.module.named_buffers(remove_duplicate=False)
    )
    for name, weight in stored.items():  # one by one: FSDP's hooks on load_state_dict expect its shards
        if name not in own or own[name].shape != weight.shape:
            raise CheckpointError(f"{run.best.path}: {name} does not fit the model")
        own[name].data.copy_(weight)
    return best.step


def export_run(run: Run, card: dict[str, str]) -> None:
    """Write the trained model to `model/`, or the adapter with its base's name to `adapter/`."""
    model, tokenizer, folder = run.module.model, run.tokenizer, run.folder
    if not adapters_of(model):
        options = {"card": card, "defaults": run.defaults, "files": run.module.export_files()}
        with read_alike(model, tokenizer):
            reader = export_model(model, tokenizer, folder / "model", **options)
        if reader == NATIVE:
            log.info("export      for this project alone: transformers has no class for such a model")
        return
    write_atomic(folder / "adapter", partial(_write_adapter, run, card))


def _write_adapter(run: Run, card: dict[str, str], folder: Path) -> None:
    """Fill an adapter's folder: weights, tokenizer, generation settings and card."""
    model, tokenizer = run.module.model, run.tokenizer
    save_adapter(model, folder, base=run.adapter_base)
    save_tokenizer(tokenizer, folder)
    write_json(folder / GENERATION, generation_config_values(model.config, token_ids(tokenizer), run.defaults))
    write_files(folder, run.module.export_files())
    (folder / "README.md").write_text(adapter_card(run.adapter_base, card), encoding="utf-8")


def _card(run: Run, flat: dict[str, object], metrics: dict[str, float], step: int) -> dict[str, str]:
    """Headings and paragraphs of the model card: command, data, metrics. step: of the weights."""
    overrides = read_overrides(run.folder / ".hydra" / "overrides.yaml")
    # a run counts once, however often it was resumed
    command = redact(" ".join(o for o in overrides if key_of(o) not in PER_COMMAND))
    headings = {"run_name": "Name", "tags": "Tags"}
    last = run.trainer.global_step
    steps = f"{last} steps" if step == last else f"step {step} of {last}, the best by {run.best.metric}"
    return {
        **{heading: str(flat[option]) for option, heading in headings.items() if option in flat},
        "Training": f"`python train.py {command}`".replace(" `", "`") + f", {steps}.",
        "Data": f"{redact(str(flat['data.path']))}, {run.monitor.tokens_seen:,} tokens seen.",
        "Metrics": "\n".join(f"- {k}: {v:.4f}" for k, v in sorted(metrics.items())) or "none",
    }


@contextmanager
def _restore_errors(run: Run, checkpoint: Path | None) -> Iterator[None]:
    """Context in which an error before the first step of a resumed run means that the checkpoint does not fit;
    CheckpointError.

    Lightning and torch raise many types for a missing or misshapen state. Network errors keep theirs.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if checkpoint is None or run.checkpoints.started or isinstance(error, dist.DistError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint}: does not fit the run as it is configured ({reason})") from error


@contextmanager
def _one_line_errors(run: Run) -> Iterator[None]:
    """Context in which errors that are no defects become one line with the last good checkpoint.

    Those are: arguments that Lightning refuses while fitting, a rendezvous that fails, errors of the operating
    system, and losses that are not finite, whose checkpoint is set aside so that a resume does not start from
    it.
    """
    try:
        with _silence_writers():
            yield
    except MisconfigurationException as error:  # Lightning refuses an argument
        line = str(error).splitlines()[0]
        if match := re.search(r"Try at least `(\w+)=(\S+)`", line):
            value = getattr(run.trainer, match[1])
            line = f"trainer.{match[1]}={value}: less than one batch; take at least {match[2]}, or a number of batches"
        raise ConfigError(line) from None
    except dist.DistNetworkError as error:  # a port that was free when Lightning looked, or a machine out of reach
        line = str(error).strip().splitlines()[0]
        raise TrainingError(f"the processes of the run cannot connect: {line}; start the command again") from None
    # the operating system, or training itself
    except Exception as error:
        os_error = system_error(error)
        if os_error is None and not isinstance(error, TrainingError):
            raise
        message = str(error) if os_error is None else system_line(os_error)
        if os_error is not None and os_error.filename is None:
            message = f"{run.folder}: {message}"
        checkpoints = run.checkpoints
        if isinstance(error, LossError) and run.trainer.is_global_zero:
            kept_as = checkpoints.set_aside(run.trainer.global_step)
            message += f" ({kept_as} is set aside)" if kept_as else ""
        otherwise = "no good checkpoint is left" if checkpoints.last_step > 0 else "no checkpoint was written yet"
        saved = f"last good checkpoint: {checkpoints.last}" if checkpoints.last.exists() else otherwise
        raise TrainingError(f"{message}; {saved}") from None


@contextmanager
def _silence_writers() -> Iterator[None]:
    """Context in which TensorBoard's writer thread prints no traceback for a full disk: the next write raises the
    error here.
    """
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    previous_hook = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        """Pass on all but errors of that thread."""
        if not (isinstance(args.thread, _AsyncWriterThread) and isinstance(args.exc_value, OSError)):
            previous_hook(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous_hook
