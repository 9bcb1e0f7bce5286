"""Run metrics: one row per log interval, measured here and sent to all loggers under the documented names.

Speed counts the tokens that the model read (`module.n_tokens`) over the time since the last row, validations excluded.
MFU divides the FLOPs of those tokens by the peak of the devices: measured for a CPU, from a table for GPUs.
"""

import time
from collections.abc import Callable, Sequence

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from genai_pl.callbacks.due import passed
from genai_pl.models import FlopRates
from genai_pl.modules.base import n_replicas

Listener = Callable[[int, dict[str, float]], None]


class Monitor(L.Callback):
    """Logs the module's step metrics with lr, gradient norm, tokens per second, MFU, data wait and memory.

    every_n_steps: optimizer steps between rows; the first and the last step always give one
    flops: function of no arguments that returns the FLOPs per token of the model, called when training starts
    listeners: called with (step, metrics) of every row, such as the console

    `tokens_seen`, of the whole run over all ranks, is part of the checkpoint.
    """

    def __init__(
        self, every_n_steps: int, *, flops: Callable[[], FlopRates], listeners: Sequence[Listener] = ()
    ) -> None:
        self.every_n_steps, self._count_flops, self.listeners = every_n_steps, flops, listeners
        self.tokens_seen = 0
        self.flops = FlopRates(0.0, 0.0, 0.0)
        self._peak_flops: float | None = None
        self._step = 0
        self._reset()  # a run that is at its last step already only validates

    def state_dict(self) -> dict[str, int]:
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tokens_seen = state["tokens_seen"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure the peak of the device, and start the first interval."""
        self.flops, self._peak_flops = self._count_flops(), peak_flops(module.device)
        self._step = trainer.global_step
        self._reset()

    def _reset(self) -> None:
        """Start a new interval: no tokens, no time waited or paused."""
        self._start = self._batch_end = time.perf_counter()
        self._tokens, self._written, self._targets = 0, 0, torch.zeros(())
        self._waited, self._paused = 0.0, 0.0

    def on_train_batch_start(self, *_: object) -> None:
        """The time since the last batch ended was spent waiting for data."""
        self._waited += time.perf_counter() - self._batch_end

    def on_validation_start(self, *_: object) -> None:
        self._pause_start = time.perf_counter()

    def on_validation_end(self, *_: object) -> None:
        self._paused += time.perf_counter() - self._pause_start
        self._batch_end = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        """Count the tokens of a batch, and log a row if one is due."""
        # tokens read by the model, targets, and tokens that an encoder-decoder writes
        n_tokens = module.n_tokens(batch) * n_replicas(trainer)
        self._tokens, self.tokens_seen = self._tokens + n_tokens, self.tokens_seen + n_tokens
        self._targets = self._targets + batch["targets"]
        self._written += batch["decoder_input_ids"].numel() if "decoder_input_ids" in batch else 0
        # one row per optimizer step at most, however many batches it has
        if trainer.global_step != self._step:
            before, self._step = self._step, trainer.global_step
            due = passed(before, self._step, self.every_n_steps)
            if due or self._step in (1, trainer.max_steps):
                self._log(trainer, module)
        self._batch_end = time.perf_counter()

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Send a row of metrics to loggers and listeners, and start a new interval."""
        metrics = module.step_metrics()  # synchronizes with the device, so that the time below is exact
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rate = self._tokens / seconds
        metrics |= module.update_metrics() | {
            "train/tokens_per_sec": rate,
            "train/data_wait": self._waited / seconds,
            "train/tokens_seen": self.tokens_seen,
            "train/memory_gib": memory_gib(module.device),
        }
        if self._peak_flops:
            n = n_replicas(trainer)  # ranks that share a batch also share its work
            done = self.flops.total(read=self._tokens, written=n * self._written, predicted=n * float(self._targets))
            metrics["train/mfu"] = done / seconds / (self._peak_flops * trainer.world_size)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=self._step)
            for listener in self.listeners:
                listener(self._step, metrics)
        self._reset()


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: on the device, or resident in RAM on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that the device can reach: from Lightning's table for GPUs, measured by a matrix product on CPU."""
    if device.type != "cpu":
        return get_available_flops(device, torch.bfloat16)
    a = torch.randn(768, 768, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best
