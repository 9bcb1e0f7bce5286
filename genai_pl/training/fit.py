"""Running a fit to its end, whatever the end is: done, stopped by a signal, out of disk, or not a number any more."""

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
from genai_pl.callbacks import Console, Interrupt, Monitor, Samples, StepCheckpoint
from genai_pl.config.redaction import masked
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.end_tokens import GENERATION, UNSAID, WritingDefaults, generation_values
from genai_pl.data.tokenizer import save_tokenizer
from genai_pl.errors import CheckpointError, ConfigError, LossError, TrainingError, system_error, system_line
from genai_pl.exporting import adapter_card, export_model, read_alike, token_ids, write_files
from genai_pl.models.hf.config import NATIVE
from genai_pl.models.hf.folder import write_json
from genai_pl.modules import BaseModule
from genai_pl.peft import adapters_of, save_adapter
from genai_pl.signals import exit_status
from genai_pl.strategies import ShardedStrategy
from genai_pl.training.length import Length
from genai_pl.training.report import closing
from genai_pl.training.sweeps import write_results
from genai_pl.training.trust import ASIDE, key_of, read_overrides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


@dataclass
class Parts:
    """The objects of one run."""

    run: Path
    trainer: L.Trainer
    module: BaseModule
    data: RowsDataModule
    tokenizer: "PreTrainedTokenizerBase"
    length: Length
    monitor: Monitor
    console: Console
    interrupt: Interrupt
    checkpoints: StepCheckpoint
    samples: Samples | None = None
    defaults: WritingDefaults = UNSAID  # of the folder that the model came from
    base: str | None = None  # where the model can be had as it began


def fit(parts: Parts, checkpoint: Path | None) -> None:
    """Train to the end or to the first signal; validate once more if the last step was not."""
    with _explained(parts):
        with _restoring(parts, checkpoint):
            parts.trainer.fit(parts.module, parts.data, ckpt_path=checkpoint, weights_only=True)
        if not parts.checkpoints.started:
            parts.checkpoints.begin()
            log.info("finished    already at step %d of %d", parts.trainer.global_step, parts.module.total_steps)
        _validate_the_end(parts)
        if not parts.interrupt.left_out and parts.trainer.is_global_zero:
            parts.checkpoints.confirm()
    if parts.interrupt.left_out and parts.trainer.is_global_zero:
        name, step, last = (
            signal.Signals(parts.interrupt.signum).name,
            parts.trainer.global_step,
            parts.checkpoints.last,
        )
        log.warning("stopped     by %s at step %d of %d, saved in %s", name, step, parts.module.total_steps, last)


def _validate_the_end(parts: Parts) -> None:
    """Validate once more if the last step was not, unless a signal has come to one of the processes."""
    parts.interrupt.begin()
    trainer, module = parts.trainer, parts.module
    if parts.interrupt.left_out or module.validated_at == trainer.global_step or not trainer.limit_val_batches:
        return
    if parts.interrupt.agree(trainer):
        parts.interrupt.left_out = True
    else:
        trainer.validate(module, parts.data, verbose=False)


def describe_saved(parts: Parts, again: list[str]) -> str:
    """What a run that ends now has saved, and the command that goes on with it."""
    last = parts.checkpoints.last
    return f"saved in {last}; python train.py {shlex.join(again)}" if last.exists() else "no checkpoint was written yet"


def finish(
    parts: Parts, *, flat: dict[str, object], export: bool, again: Iterable[str] = (), whole: Path | None = None
) -> int:
    """Export, say where everything lies and how to go on, itself or the whole sweep, and return the exit status."""
    metrics = {k: float(v) for k, v in parts.trainer.callback_metrics.items() if k.startswith("val/")}
    with _explained(parts):
        for logger in parts.trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and metrics:
                logger.log_hyperparams(flat, metrics, step=parts.trainer.global_step)
            logger.finalize("success")
        if export and isinstance(parts.trainer.strategy, ShardedStrategy):
            parts.trainer.strategy.gather()
        if export and parts.trainer.is_global_zero:
            export_run(parts, _card(parts, flat, metrics))
        done = parts.trainer.global_step >= parts.module.total_steps and not parts.interrupt.left_out
        if done and parts.trainer.is_global_zero:
            write_results(parts.run, parts.trainer.global_step, metrics)
    if parts.trainer.is_global_zero:
        options = parts.module.generate_options(parts.data.prompt(), parts.tokenizer.mask_token)
        name = ("adapter" if adapters_of(parts.module.model) else "model") if export else None
        lines = closing(parts.run, exported=name, finished=done, generate=options, again=again, whole=whole)
        print(*lines, sep="\n", flush=True)
    return exit_status(parts.interrupt.signum) if parts.interrupt.left_out else 0


def export_run(parts: Parts, card: dict[str, str]) -> None:
    """Write the model, or the adapter with the name of its base."""
    model, tokenizer, run = parts.module.model, parts.tokenizer, parts.run
    if not adapters_of(model):
        options = {"card": card, "defaults": parts.defaults, "files": parts.module.export_files()}
        with read_alike(model, tokenizer):
            reader = export_model(model, tokenizer, run / "model", **options)
        if reader == NATIVE:
            log.info("export      for this project alone: transformers has no class for such a model")
        return
    write_atomic(run / "adapter", partial(_write_adapter, parts, card))


def _write_adapter(parts: Parts, card: dict[str, str], folder: Path) -> None:
    model, tokenizer = parts.module.model, parts.tokenizer
    save_adapter(model, folder, base=parts.base)
    save_tokenizer(tokenizer, folder)
    write_json(folder / GENERATION, generation_values(model.config, token_ids(tokenizer), parts.defaults))
    write_files(folder, parts.module.export_files())
    (folder / "README.md").write_text(adapter_card(parts.base, card), encoding="utf-8")


def _card(parts: Parts, flat: dict[str, object], metrics: dict[str, float]) -> dict[str, str]:
    overrides = read_overrides(parts.run / ".hydra" / "overrides.yaml")
    given = masked(" ".join(o for o in overrides if key_of(o) not in ASIDE))  # a run is one, however often taken up
    named = {"run_name": "Name", "tags": "Tags"}
    return {
        **{heading: str(flat[option]) for option, heading in named.items() if option in flat},
        "Training": f"`python train.py {given}`".replace(" `", "`") + f", {parts.trainer.global_step} steps.",
        "Data": f"{masked(str(flat['data.path']))}, {parts.monitor.tokens_seen:,} tokens seen.",
        "Metrics": "\n".join(f"- {k}: {v:.4f}" for k, v in sorted(metrics.items())) or "none",
    }


@contextmanager
def _restoring(parts: Parts, checkpoint: Path | None) -> Iterator[None]:
    """What a checkpoint does not fit is told in one line, as long as the first step has not begun."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if checkpoint is None or parts.checkpoints.started or isinstance(error, dist.DistError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint}: does not fit the run as it is configured ({reason})") from error


@contextmanager
def _explained(parts: Parts) -> Iterator[None]:
    """What ends a run by no fault of the code is told in one line, with the last good checkpoint."""
    try:
        with _quiet_writers():
            yield
    except MisconfigurationException as error:  # Lightning's checks of what it was given
        line = str(error).splitlines()[0]
        if found := re.search(r"Try at least `(\w+)=(\S+)`", line):
            asked = getattr(parts.trainer, found[1])
            line = f"trainer.{found[1]}={asked}: less than one batch; take at least {found[2]}, or a number of batches"
        raise ConfigError(line) from None
    except dist.DistNetworkError as error:  # a port that was free when Lightning looked, or a machine out of reach
        line = str(error).strip().splitlines()[0]
        raise TrainingError(f"the processes of the run cannot connect: {line}; start the command again") from None
    except Exception as error:
        refused = system_error(error)
        if refused is None and not isinstance(error, TrainingError):
            raise
        what = str(error) if refused is None else system_line(refused)
        if refused is not None and refused.filename is None:
            what = f"{parts.run}: {what}"
        checkpoints = parts.checkpoints
        if isinstance(error, LossError) and parts.trainer.is_global_zero:
            aside = checkpoints.set_aside(parts.trainer.global_step)
            what += f" ({aside} is set aside)" if aside else ""
        none = "no good checkpoint is left" if checkpoints.last_step > 0 else "no checkpoint was written yet"
        saved = f"last good checkpoint: {checkpoints.last}" if checkpoints.last.exists() else none
        raise TrainingError(f"{what}; {saved}") from None


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Inside, TensorBoard's thread prints no trace of what the disk refuses it: the next write raises it here."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    before = threading.excepthook

    def hook(what: threading.ExceptHookArgs) -> None:
        if not (isinstance(what.thread, _AsyncWriterThread) and isinstance(what.exc_value, OSError)):
            before(what)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
