"""Typed nodes of the configuration, so that a typo or a wrong type fails while it is composed; conf/ explains the fields."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from genai_pl.names import AttentionBackend
from genai_pl.specs import GenerationConfig, ModelConfig


@dataclass
class Root:
    """What every training command takes beside its groups."""

    seed: int = 0
    output_dir: str = MISSING
    init_from: str | None = None
    resume: str | None = None
    compile: bool = False
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


@dataclass
class Wrapped:
    """A causal language model of transformers."""

    name: str = MISSING
    max_seq_len: int = 1024
    attention: AttentionBackend = AttentionBackend.auto


@dataclass
class Data:
    """Text to train and validate on."""

    _target_: str = "genai_pl.data.text.TextDataModule"
    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    column: str = "text"
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True
    streaming: bool = False
    block_rows: int = 1024
    val_documents: int = 100
    separate_documents: bool = True


@dataclass
class Pairs:
    """Pairs of texts to train and validate embeddings on."""

    _target_: str = "genai_pl.data.pairs.PairsDataModule"
    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    anchor: str = "anchor"
    positive: str | None = "positive"
    negative: str | None = None
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True


@dataclass
class Chat:
    """Examples to imitate."""

    _target_: str = "genai_pl.data.conversations.ChatDataModule"
    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    packing: bool = True
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True


@dataclass
class Preference:
    """Prompts with a chosen and a rejected completion."""

    _target_: str = "genai_pl.data.preferences.PreferenceDataModule"
    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str | None = None
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True


@dataclass
class Unpaired:
    """Completions that were liked or not."""

    _target_: str = "genai_pl.data.preferences.UnpairedDataModule"
    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True


@dataclass
class Prompts:
    """Prompts that the model answers in training."""

    _target_: str = "genai_pl.data.preferences.PromptsDataModule"
    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    prompt: str = "prompt"
    max_prompt_len: int = MISSING
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True


@dataclass
class Generate:
    """What `generate.py` takes."""

    checkpoint: str = "auto"
    adapter: Any = None
    adapter_weights: Any = None
    prompt: str | None = None
    prompt_file: str | None = None
    num_samples: int = 1
    stream: bool = True
    seed: int = 0
    device: str = "auto"
    precision: Any = None
    generation: Any = None


@dataclass
class Export:
    """What `export.py` takes."""

    checkpoint: str = "auto"
    adapter: str | None = None
    format: str = "hf"
    dtype: str | None = None
    out: str = MISSING


@dataclass
class EvaluateData:
    """Text, or prompts and completions, to be predicted."""

    path: str = MISSING
    column: str | None = None
    seq_len: int | None = None
    stride: int | None = None
    bos: bool | None = None


@dataclass
class Evaluate:
    """What `evaluate.py` takes."""

    checkpoint: str = "auto"
    limit: int | None = None
    batch_tokens: int = 4096
    out: str | None = None
    device: str = "auto"
    precision: Any = None
    data: EvaluateData = field(default_factory=EvaluateData)


NODES = {
    "root": Root,
    "model": ModelConfig,
    "wrapped": Wrapped,
    "data": Data,
    "pairs": Pairs,
    "chat": Chat,
    "preference": Preference,
    "unpaired": Unpaired,
    "prompts": Prompts,
    "generation": GenerationConfig,
    "generate": Generate,
    "evaluate": Evaluate,
    "export": Export,
}
