"""What `train.py` takes beside its data."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from genai_pl.config.enums import AttentionBackend


@dataclass
class TrainSchema:
    """What every training command takes beside its groups."""

    seed: int = 0
    run_name: str | None = None
    tags: list[str] = field(default_factory=list)
    output_dir: str = MISSING
    init_from: str | None = None
    resume: str | None = None
    compile: bool = False
    profile: bool = False
    dry_run: bool = False
    model: Any = None
    objective: Any = None
    data: Any = None
    tokenizer: Any = None
    peft: Any = None
    optimizer: Any = None
    scheduler: Any = None
    precision: Any = None
    strategy: Any = None
    trainer: Any = None
    callbacks: Any = None
    logger: Any = None
    generation: Any = None
    plan: Any = None
    optimized_metric: str | None = None


@dataclass
class HardwareSpec:
    """A device that `dry_run=true` reckons with."""

    gpu: str = MISSING
    bf16: float | None = None
    fp8: float | None = None
    tf32: float | None = None
    fp32: float | None = None
    memory: float | None = None
    link: float = MISSING
    network: float = MISSING
    per_node: int = 8
    efficiency: float = 0.4


@dataclass
class TransformersModelSchema:
    """A causal language model of transformers."""

    name: str = MISSING
    max_seq_len: int = 1024
    attention: AttentionBackend = AttentionBackend.auto
