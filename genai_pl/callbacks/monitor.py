"""What a run is doing, measured at every log interval and written to all loggers under the documented names."""

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

    `flops` gives those of a token, for MFU, once the data are there; `listeners` are called with (step, metrics) for
    every row, so that the console prints what the files hold.
    """

    def __init__(
        self, every_n_steps: int, *, flops: Callable[[], FlopRates], listeners: Sequence[Listener] = ()
    ) -> None:
        self.every_n_steps, self._count_flops, self.listeners = every_n_steps, flops, listeners
        self.tokens_seen = 0
        self.flops = FlopRates(0.0, 0.0, 0.0)
        self._peak_flops: float | None = None
        self._step = 0
        self._reset()  # a run that is at its last step already is validated without being trained

    def state_dict(self) -> dict[str, int]:
        return {"tokens_seen": self.tokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.tokens_seen = state["tokens_seen"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.flops, self._peak_flops = self._count_flops(), peak_flops(module.device)
        self._step = trainer.global_step
        self._reset()

    def _reset(self) -> None:
        self._start = self._batch_end = time.perf_counter()
        self._tokens, self._written, self._targets = 0, 0, torch.zeros(())
        self._waited, self._paused = 0.0, 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._batch_end

    def on_validation_start(self, *_: object) -> None:
        self._pause_start = time.perf_counter()

    def on_validation_end(self, *_: object) -> None:
        self._paused += time.perf_counter() - self._pause_start
        self._batch_end = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        n_tokens = module.n_tokens(batch) * n_replicas(trainer)
        self._tokens, self.tokens_seen = self._tokens + n_tokens, self.tokens_seen + n_tokens
        self._targets = self._targets + batch["targets"]
        self._written += batch["decoder_input_ids"].numel() if "decoder_input_ids" in batch else 0
        if trainer.global_step != self._step:
            before, self._step = self._step, trainer.global_step
            due = passed(before, self._step, self.every_n_steps)
            if due or self._step in (1, trainer.max_steps):
                self._log(trainer, module)
        self._batch_end = time.perf_counter()

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = module.step_metrics()  # waits for the device
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        rate = self._tokens / seconds
        metrics |= module.update_metrics() | {
            "train/tokens_per_sec": rate,
            "train/data_wait": self._waited / seconds,
            "train/tokens_seen": self.tokens_seen,
            "train/memory_gib": memory_gib(module.device),
        }
        if self._peak_flops:
            n = n_replicas(trainer)  # processes that see other batches; those that share one share its work
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
