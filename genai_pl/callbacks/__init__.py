"""Callbacks for what Lightning lacks: exact checkpoints, clean interruption, one row of metrics for all outputs, samples."""

from genai_pl.callbacks.attention import AttentionProbe
from genai_pl.callbacks.benchmarks import Benchmarks
from genai_pl.callbacks.best import BestCheckpoint, EarlyStop
from genai_pl.callbacks.checkpoint import AtomicCheckpointIO, StepCheckpoint
from genai_pl.callbacks.checkpoint_files import newest_checkpoints, saved_at, step_of
from genai_pl.callbacks.compilation import CompileProbe
from genai_pl.callbacks.confusion import ConfusionPicture
from genai_pl.callbacks.console import Console, duration
from genai_pl.callbacks.divergence import Divergence, LossWatch
from genai_pl.callbacks.ema import EMA
from genai_pl.callbacks.interrupt import Interrupt
from genai_pl.callbacks.metrics_csv import MetricsCSV
from genai_pl.callbacks.mirror import Mirror
from genai_pl.callbacks.monitor import Monitor, memory_gib, products_dtype
from genai_pl.callbacks.profile import Profile
from genai_pl.callbacks.samples import Samples

__all__ = [
    "AtomicCheckpointIO",
    "AttentionProbe",
    "Benchmarks",
    "BestCheckpoint",
    "CompileProbe",
    "ConfusionPicture",
    "Console",
    "Divergence",
    "EMA",
    "EarlyStop",
    "Interrupt",
    "LossWatch",
    "MetricsCSV",
    "Mirror",
    "Monitor",
    "Profile",
    "Samples",
    "StepCheckpoint",
    "duration",
    "memory_gib",
    "newest_checkpoints",
    "products_dtype",
    "saved_at",
    "step_of",
]
