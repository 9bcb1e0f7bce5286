"""Schemas of train.py beside its data: the root, the hardware of a dry run, and a model of transformers."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from genai_pl.config.enums import AttentionBackend


@dataclass
class TrainSchema:
    """Root of train.py: options without a group, and the groups.

    init_from: weights to start from. init_layers: how many of its layers, or which. resume: a run to go on with.
    compile: torch.compile of blocks: auto, true, false. profile: a trace of a few steps. dry_run: estimate instead of training.
    optimized_metric: what a searching sweeper gets back.
    """

    seed: int = 0
    run_name: str | None = None
    tags: list[str] = field(default_factory=list)
    output_dir: str = MISSING
    init_from: str | None = None
    init_layers: Any = None
    resume: str | None = None
    compile: bool | str = "auto"
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
    eval: Any = None
    generation: Any = None
    plan: Any = None
    optimized_metric: str | None = None


@dataclass
class DataCommandSchema(TrainSchema):
    """Options of data.py beside those of train.py that say what is read.

    task: inspect or prepare. rows, width (characters), color, picture: of what is shown. encoders: processes.
    """

    task: str = "inspect"
    rows: int = 3
    width: int = 2000
    color: bool | None = None
    picture: str | None = "lengths.png"
    encoders: int = 0


@dataclass
class DistillCommandSchema(TrainSchema):
    """Options of distill.py beside those of train.py that say what is read.

    teacher: model, address. top_k: tokens of a position. temperature: of the predictions. out: folder. device: of the teacher.
    """

    teacher: str = MISSING
    top_k: int = 64
    temperature: float = 1.0
    out: str = "taught"
    device: str = "auto"


@dataclass
class HardwareSpec:
    """A device for which `dry_run=true` estimates a step.

    gpu: its name. bf16, fp8, tf32, fp32: dense TFLOP/s of products in that type; null where it is unknown.
    memory: GB of a device. link, network: GB/s one way within and between nodes.
    per_node: devices of a node. efficiency: share of the peak FLOP/s that a training step reaches.
    """

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
    """A causal language model that transformers runs (`model=hf`)."""

    name: str = MISSING
    max_seq_len: int = 1024
    attention: AttentionBackend = AttentionBackend.auto
