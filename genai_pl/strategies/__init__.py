"""Strategies: sharding, tensor and pipeline parallelism, recomputation, float8, and the processes of a run."""

from genai_pl.strategies.deepspeed import ZeroStrategy, deepspeed
from genai_pl.strategies.float8 import float8
from genai_pl.strategies.launcher import RankLauncher, follow_launcher, launched
from genai_pl.strategies.pipeline import PipelineStrategy
from genai_pl.strategies.recompute import kept_operations, recompute
from genai_pl.strategies.sharded import ShardedStrategy
from genai_pl.strategies.slurm import choose_environment, started_devices

__all__ = [
    "PipelineStrategy",
    "RankLauncher",
    "ShardedStrategy",
    "ZeroStrategy",
    "choose_environment",
    "deepspeed",
    "float8",
    "follow_launcher",
    "kept_operations",
    "launched",
    "recompute",
    "started_devices",
]
