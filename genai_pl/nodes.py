"""Typed nodes of the configuration, so that a typo or a wrong type fails while it is composed; conf/ explains the fields."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from genai_pl.names import AttentionBackend
from genai_pl.serving.node import Serve
from genai_pl.specs import GenerationConfig, ModelConfig


@dataclass
class Root:
    """What every training command takes beside its groups."""

    seed: int = 0
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
class Plan:
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
class Wrapped:
    """A causal language model of transformers."""

    name: str = MISSING
    max_seq_len: int = 1024
    attention: AttentionBackend = AttentionBackend.auto


@dataclass
class Rows:
    """What every kind of data takes."""

    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True


@dataclass
class Data(Rows):
    """Text to train and validate on."""

    _target_: str = "genai_pl.data.text.TextDataModule"
    column: str = "text"
    streaming: bool = False
    block_rows: int = 1024
    val_documents: int = 100
    separate_documents: bool = True


@dataclass
class Pairs(Rows):
    """Pairs of texts to train and validate embeddings on."""

    _target_: str = "genai_pl.data.pairs.PairsDataModule"
    anchor: str = "anchor"
    positive: str | None = "positive"
    negative: str | None = None


@dataclass
class Seq2Seq(Rows):
    """Sources and targets for an encoder-decoder."""

    _target_: str = "genai_pl.data.seq2seq.Seq2SeqDataModule"
    source: str = "source"
    target: str = "target"
    packing: bool = True


@dataclass
class Chat(Rows):
    """Examples to imitate."""

    _target_: str = "genai_pl.data.conversations.ChatDataModule"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    packing: bool = True


@dataclass
class Preference(Rows):
    """Prompts with a chosen and a rejected completion."""

    _target_: str = "genai_pl.data.preferences.PreferenceDataModule"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completions: str = "completions"
    margin: str | None = None


@dataclass
class Unpaired(Rows):
    """Completions that were liked or not."""

    _target_: str = "genai_pl.data.preferences.UnpairedDataModule"
    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"


@dataclass
class Prompts(Rows):
    """Prompts that the model answers in training."""

    _target_: str = "genai_pl.data.preferences.PromptsDataModule"
    prompt: str = "prompt"
    max_prompt_len: int = MISSING


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
class Export:
    """What `export.py` takes."""

    checkpoint: str = "auto"
    adapter: str | None = None
    format: str = "hf"
    dtype: str | None = None
    quantize: str | None = None
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


@dataclass
class FeedbackData:
    """The prompts that `feedback.py` works on."""

    path: str = MISSING
    prompt: str = "prompt"
    first: str = "chosen"
    second: str = "rejected"


@dataclass
class Feedback:
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
    data: FeedbackData = field(default_factory=FeedbackData)
    generation: Any = None


NODES = {
    "root": Root,
    "model": ModelConfig,
    "plan": Plan,
    "wrapped": Wrapped,
    "data": Data,
    "pairs": Pairs,
    "seq2seq": Seq2Seq,
    "chat": Chat,
    "preference": Preference,
    "unpaired": Unpaired,
    "prompts": Prompts,
    "generation": GenerationConfig,
    "generate": Generate,
    "evaluate": Evaluate,
    "export": Export,
    "feedback": Feedback,
    "serve": Serve,
}
