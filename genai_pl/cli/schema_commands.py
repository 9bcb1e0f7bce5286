"""What the commands beside `train.py` take."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class GenerateSchema:
    """What `generate.py` takes."""

    checkpoint: str = "auto"
    adapter: Any = None
    adapter_weights: Any = None
    prompt: str | None = None
    prompt_file: str | None = None
    chat: bool = False
    system: str | None = None
    num_samples: int = 1
    stream: bool = True
    logprobs: bool = False
    embed: bool = False
    pooling: str | None = None
    score: bool = False
    top_k: int = 5
    seed: int = 0
    device: str = "auto"
    precision: Any = None
    generation: Any = None


@dataclass
class ExportSchema:
    """What `export.py` takes."""

    checkpoint: str = "auto"
    adapter: str | None = None
    format: str = "hf"
    dtype: str | None = None
    quantize: str | None = None
    out: str = MISSING


@dataclass
class EvaluateDataSchema:
    """Text, completions or choices to be predicted."""

    path: str = MISSING
    column: str | None = None
    last_word: bool = False
    seq_len: int | None = None
    stride: int | None = None
    bos: bool | None = None


@dataclass
class EvaluateSchema:
    """What `evaluate.py` takes."""

    checkpoint: str = "auto"
    tasks: Any = None
    num_fewshot: int | None = None
    batch_size: int = 8
    limit: int | None = None
    batch_tokens: int = 4096
    out: str | None = None
    device: str = "auto"
    precision: Any = None
    data: EvaluateDataSchema = field(default_factory=EvaluateDataSchema)


@dataclass
class FeedbackDataSchema:
    """The prompts that `feedback.py` works on."""

    path: str = MISSING
    prompt: str = "prompt"
    first: str = "chosen"
    second: str = "rejected"


@dataclass
class FeedbackSchema:
    """What `feedback.py` takes."""

    task: str = "label"
    checkpoint: str = "auto"
    judge: str | None = None
    judge_model: str = "default"
    key_variable: str = "OPENAI_API_KEY"
    retries: int = 4
    workers: int = 8
    rubric: str = ""
    constitution: str | None = None
    limit: int | None = None
    out: str = "feedback.jsonl"
    seed: int = 0
    device: str = "auto"
    data: FeedbackDataSchema = field(default_factory=FeedbackDataSchema)
    generation: Any = None


@dataclass
class ServeSchema:
    """What `serve.py` takes."""

    checkpoint: str = "auto"
    adapter: Any = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    device: str = "auto"
    dtype: str = "fp32"
    backend: str = "local"
    url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    slots: int = 8
    max_length: int | None = None
    pooling: str | None = None
    cache: str | None = "memory"
    cache_ttl: float = 3600.0
    cache_mib: float = 64.0
    queue_size: int = 64
    timeout: float = 120.0
    max_tokens: int = 4096
    max_n: int = 16
    max_inputs: int = 256
    max_input_tokens: int = 131_072
    max_body_mib: float = 4.0
    drain: float = 30.0
    api_keys: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    generation: Any = None
