"""Run metrics: one row per log interval, measured here and sent to all loggers under the documented names.

Speed counts the tokens that the model read (`module.n_tokens`) over the time since the last row, validations excluded.
MFU divides the FLOPs of those tokens by the peak of the devices in the precision of the run's products: measured for a CPU,
from a table for GPUs.
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

    `tokens_seen`, of the whole run over all ranks, is part of the checkpoint. `seconds` is of this process: of
    `training` in all, and in it of `data` (waiting for batches) and `validation`.
    """

    def __init__(
        self, every_n_steps: int, *, flops: Callable[[], FlopRates], listeners: Sequence[Listener] = ()
    ) -> None:
        self.every_n_steps, self._count_flops, self.listeners = every_n_steps, flops, listeners
        self.tokens_seen = 0
        self.seconds = {"training": 0.0, "data": 0.0, "validation": 0.0}
        self.flops = FlopRates(0.0, 0.0, 0.0)
        self.last: dict[str, float] = {}  # the newest row
        self._peak_flops: float | None = None
        self._step = 0
        self._began: float | None = None  # when training has, while it lasts
        self._reset()  # a run that is at its last step already only validates

    def state_dict(self) -> dict[str, int]:
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tokens_seen = state["tokens_seen"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Measure the peak of the device, and start the first interval."""
        self.flops, self._peak_flops = self._count_flops(), peak_flops(module.device, products_dtype(trainer.precision))
        self._step = trainer.global_step
        self._began = time.perf_counter()
        self._reset()

    def on_fit_end(self, *_: object) -> None:
        """Training has ended, its last checkpoint included."""
        if self._began is not None:
            self.seconds["training"] += time.perf_counter() - self._began
            self._began = None

    def _reset(self) -> None:
        """Start a new interval: no tokens, no time waited or paused."""
        self._start = self._batch_end = time.perf_counter()
        self._tokens, self._written, self._targets = 0, 0, torch.zeros(())
        self._waited, self._paused = 0.0, 0.0

    def on_train_batch_start(self, *_: object) -> None:
        """The time since the last batch ended was spent waiting for data."""
        waited = time.perf_counter() - self._batch_end
        self._waited += waited
        self.seconds["data"] += waited

    def leave_out(self, seconds: float) -> None:
        """Leave seconds that have just passed between two batches out of the interval: samples or benchmarks."""
        self._paused += seconds
        self._batch_end += seconds

    def on_validation_start(self, *_: object) -> None:
        self._pause_start = time.perf_counter()

    def on_validation_end(self, *_: object) -> None:
        """Leave the validation out of the interval; one after training counts as part of it."""
        paused = time.perf_counter() - self._pause_start
        self._paused += paused
        self.seconds["validation"] += paused
        if self._began is None:
            self.seconds["training"] += paused
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
            **(trainer.datamodule.mixture_metrics() if trainer.datamodule else {}),
        }
        if self._peak_flops:
            n = n_replicas(trainer)  # ranks that share a batch also share its work
            done = self.flops.total(read=self._tokens, written=n * self._written, predicted=n * float(self._targets))
            metrics["train/mfu"] = done / seconds / (self._peak_flops * trainer.world_size)
        self.last = metrics
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


def products_dtype(precision: str) -> torch.dtype:
    """The dtype of products under a precision of Lightning's; fp8 counts as bf16, of which the others' tables are."""
    if precision.startswith("32"):
        return torch.float32
    return torch.float16 if precision.startswith("16") else torch.bfloat16


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s in products of `dtype`: from Lightning's table for GPUs, which knows tf32, measured by a product on CPU."""
    if device.type != "cpu":
        return get_available_flops(device, dtype)
    a = torch.randn(768, 768, generator=torch.Generator().manual_seed(0)).to(dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 768**3 / best
