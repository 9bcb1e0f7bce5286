"""Profiling: where the time of a training step goes, by torch's profiler."""

import logging
from pathlib import Path

import lightning as L
from torch.profiler import ProfilerActivity, profile, schedule

from genai_pl.atomic_io import write_atomic

log = logging.getLogger(__name__)
SKIPPED, WARM, MEASURED = 1, 1, 3  # batches; the first are slower than the others


class Profile(L.Callback):
    """Writes `trace.json` (chrome://tracing, perfetto.dev) of three batches, and logs the operations that cost most.

    folder: of the trace
    rows: operations that are logged
    """

    def __init__(self, folder: Path, *, rows: int = 10) -> None:
        self.folder, self.rows = folder, rows
        self._profiler: profile | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the profiler, which waits and warms up for a batch each; the first rank writes."""
        activities = [ProfilerActivity.CPU]
        if module.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        plan = schedule(wait=SKIPPED, warmup=WARM, active=MEASURED, repeat=1)
        ready = self._write if trainer.is_global_zero else None
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=ready)
        self._profiler.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Advance by a batch, and stop after the last measured one."""
        if self._profiler is None:
            return
        self._profiler.step()
        if self._profiler.step_num > SKIPPED + WARM + MEASURED:
            self._close()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._profiler is not None:
            self._close()

    def _close(self) -> None:
        """Stop the profiler, which writes what it has measured."""
        profiler, self._profiler = self._profiler, None
        profiler.stop()

    def _write(self, profiler: profile) -> None:
        """The trace and the log lines; one line where the run had too few batches."""
        measured = min(profiler.step_num - SKIPPED - WARM, MEASURED)
        if measured < 1:
            log.info("profile     none: it takes %d batches, and there were fewer", SKIPPED + WARM + 1)
            return
        path = self.folder / "trace.json"
        write_atomic(path, lambda temporary: profiler.export_chrome_trace(str(temporary)))
        log.info("profile     %s; the operations that cost most in %d batches:", path, measured)
        for line in costliest(profiler, rows=self.rows):
            log.info("%s", line)


def costliest(profiler: profile, *, rows: int) -> list[str]:
    """A line for each of the operations with the most time of their own: share, milliseconds, calls, name."""
    device = any(event.self_device_time_total for event in profiler.key_averages())
    kind = "self_device_time_total" if device else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: getattr(event, kind), reverse=True)
    total = sum(getattr(event, kind) for event in events) or 1
    return [
        f"  {100 * getattr(event, kind) / total:5.1f}% {getattr(event, kind) / 1000:10.1f} ms {event.count:7,} x {event.key}"
        for event in events[:rows]
    ]
