"""Running a fit to its end, whatever the end is: done, stopped by a signal, out of disk, or not a number any more."""

import logging
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from genai_pl.callbacks import Console, Interrupt, Monitor, Samples, StepCheckpoint
from genai_pl.data.datamodule import RowsDataModule
from genai_pl.data.ends import GENERATION, UNSAID, WritingDefaults, generation_values
from genai_pl.data.tokenizer import save_tokenizer
from genai_pl.errors import DISK_FULL, CheckpointError, TrainingError
from genai_pl.export import adapter_card, export_model, read_alike, token_ids, write_files
from genai_pl.files import write_atomic
from genai_pl.masking import masked
from genai_pl.models.folder import write_json
from genai_pl.modules import BaseModule
from genai_pl.peft import adapters_of, save_adapter
from genai_pl.strategies import ShardedStrategy
from genai_pl.summary import closing
from genai_pl.sweeps import write_results
from genai_pl.trust import ASIDE, key_of, read_overrides

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
        if parts.interrupt.signum is None and parts.module.validated_at != parts.trainer.global_step:
            parts.trainer.validate(parts.module, parts.data, verbose=False)


def finish(parts: Parts, *, flat: dict[str, object], export: bool, again: Iterable[str] = ()) -> int:
    """Export, say where everything lies and how to go on, and return the exit status."""
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
    done = parts.trainer.global_step >= parts.module.total_steps
    if parts.trainer.is_global_zero:
        if done:
            write_results(parts.run, parts.trainer.global_step, metrics)
        prompt = parts.module.make_prompt(parts.data.prompt()) if parts.module.model.config.writes else None
        name = ("adapter" if adapters_of(parts.module.model) else "model") if export else None
        print(*closing(parts.run, exported=name, finished=done, prompt=prompt, again=again), sep="\n", flush=True)
    return 130 if parts.interrupt.signum == signal.SIGINT else 0


def export_run(parts: Parts, card: dict[str, str]) -> None:
    """Write the model, or the adapter with the name of its base."""
    model, tokenizer, run = parts.module.model, parts.tokenizer, parts.run
    if not adapters_of(model):
        options = {"card": card, "defaults": parts.defaults, "files": parts.module.export_files()}
        with read_alike(model, tokenizer):
            export_model(model, tokenizer, run / "model", **options)
        return
    save_adapter(model, run / "adapter", base=parts.base)
    save_tokenizer(tokenizer, run / "adapter")
    values = generation_values(model.config, token_ids(tokenizer), parts.defaults)
    write_atomic(run / "adapter" / GENERATION, lambda path: write_json(path, values))
    write_files(run / "adapter", parts.module.export_files())
    write_atomic(
        run / "adapter" / "README.md", lambda path: path.write_text(adapter_card(parts.base, card), encoding="utf-8")
    )


def _card(parts: Parts, flat: dict[str, object], metrics: dict[str, float]) -> dict[str, str]:
    overrides = read_overrides(parts.run / ".hydra" / "overrides.yaml")
    given = masked(" ".join(o for o in overrides if key_of(o) not in ASIDE))  # a run is one, however often taken up
    return {
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
        if checkpoint is None or parts.checkpoints.started:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise CheckpointError(f"{checkpoint}: does not fit the run as it is configured ({reason})") from error


@contextmanager
def _explained(parts: Parts) -> Iterator[None]:
    """What ends a run by no fault of the code is told in one line, with the last good checkpoint."""
    try:
        yield
    except (TrainingError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        if not full and not isinstance(error, TrainingError):
            raise
        what = f"the disk is full ({error.filename or parts.run})" if full else str(error)
        last = parts.checkpoints.last
        saved = f"last good checkpoint: {last}" if last.exists() else "no checkpoint was written yet"
        raise TrainingError(f"{what}; {saved}") from None
