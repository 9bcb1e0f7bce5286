"""Schemas of the commands other than train.py; conf/COMMAND.yaml explains every field."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from genai_pl.config.tasks import GenerationTaskOptions


@dataclass
class GenerateSchema:
    """Options of `generate.py`.

    checkpoint: a reference (`auto`, a run, a folder, a Hub id). adapter: one, several, or names to folders.
    adapter_weights: a factor for each. prompt, prompt_file: texts to continue, stdin if both are null.
    tools: functions of a chat. num_samples: completions per prompt. stream: print while decoding. chat, embed,
    score: what to do instead of continuing. query: first text of scored pairs. top_k: candidates per mask. dtype: of
    the weights, null as precision has them. precision, generation: groups.
    """

    checkpoint: str = "auto"
    adapter: Any = None
    adapter_weights: Any = None
    prompt: str | None = None
    prompt_file: str | None = None
    chat: bool = False
    system: str | None = None
    tools: Any = None
    num_samples: int = 1
    stream: bool = True
    logprobs: bool = False
    embed: bool = False
    pooling: str | None = None
    score: bool = False
    query: str | None = None
    top_k: int = 5
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    precision: Any = None
    generation: Any = None


@dataclass
class ExportSchema:
    """Options of `export.py`.

    checkpoint, adapter: references. format: hf, merged, peft, onnx, gguf or gguf_lora. dtype: fp32, bf16 or fp16, null
    keeps that of the files.
    quantize: null; int8 for onnx; f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 for gguf. average: checkpoints
    of a run whose mean is exported. out: the new folder.
    """

    checkpoint: str = "auto"
    adapter: str | None = None
    format: str = "hf"
    dtype: str | None = None
    quantize: str | None = None
    average: int | None = None
    out: str = MISSING


@dataclass
class EvaluateDataSchema(GenerationTaskOptions):
    """The data of `evaluate.py`: texts, completions, choices, pairs, conversations or labelled texts to score, or prompts
    to continue, by the options of GenerationTaskOptions.

    path: file, folder or Hub data set. columns: names that files give to others. column: of texts.
    last_word: score the last word only (LAMBADA).
    seq_len, stride: window and step in tokens. bos: whether rows begin with the begin token.
    """

    path: str = MISSING
    columns: dict[str, str] = field(default_factory=dict)
    column: str | None = None
    last_word: bool = False
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    tokens: str = "tokens"
    tags: str = "tags"
    query: str = "query"
    document: str = "documents"
    relevance: str = "labels"
    seq_len: int | None = None
    stride: int | None = None
    bos: bool | None = None


@dataclass
class EvaluateSchema:
    """Options of `evaluate.py`.

    checkpoint: a reference. tasks: of lm-evaluation-harness, instead of data. num_fewshot: examples in their
    prompts. batch_size: rows of a harness batch. batch_tokens: tokens of a batch of data. limit: rows, or
    examples per task. out: a JSON file. completions: a JSON lines file. execute_code: whether programs may run.
    dtype: of the weights, null as precision has them.
    """

    checkpoint: str = "auto"
    tasks: Any = None
    num_fewshot: int | None = None
    batch_size: int = 8
    limit: int | None = None
    batch_tokens: int = 4096
    execute_code: bool = False
    completions: str | None = None
    out: str | None = None
    device: str = "auto"
    dtype: str | None = None
    precision: Any = None
    data: EvaluateDataSchema = field(default_factory=EvaluateDataSchema)


@dataclass
class FeedbackDataSchema:
    """The data of `feedback.py`: `path`, names that its files give to columns, and the columns of prompts and of two
    answers, if it has answers; or of pairs.
    """

    path: str = MISSING
    columns: dict[str, str] = field(default_factory=dict)
    prompt: str = "prompt"
    first: str = "chosen"
    second: str = "rejected"
    anchor: str = "anchor"
    positive: str = "positive"


@dataclass
class NegativesSchema:
    """Options of task=negatives: the fields of evaluation/negatives.py, further candidates, and the form of a line."""

    n: int = 3
    range_min: int = 0
    range_max: int | None = None
    min_score: float | None = None
    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    positive_max_rank: int | None = None
    sampling: str = "top"
    corpus: str | None = None
    corpus_column: str = "text"
    pooling: str | None = None
    format: str = "triplet"


@dataclass
class FeedbackSchema:
    """Options of `feedback.py`.

    task: label, critique or negatives. checkpoint: the model that answers. judge: model, reward model or URL that
    compares. judge_model,
    key_variable, retries, workers: of endpoints. rubric: what the judge is to prefer. constitution: a file of
    principles. limit: rows.
    out: the JSON lines file that is appended to.
    """

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
    negatives: NegativesSchema = field(default_factory=NegativesSchema)
    generation: Any = None


@dataclass
class ServeSchema:
    """Options of `serve.py`; the fields of serving/settings.py and its limits.

    slots: sequences decoded together. max_length: context in tokens. prefill_chunk: prompt tokens between two steps.
    prefix_cache_mib: of keys and values of earlier requests. cache, cache_ttl (s), cache_mib: of
    finished answers. queue_size, timeout (s), max_*: limits of requests. drain: seconds for running answers at
    shutdown. otlp_endpoint: a collector of traces. adapters_root: folder of adapters to load later. admin_keys, api_keys: files.
    """

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
    prefill_chunk: int | None = None
    prefix_cache_mib: float = 512.0
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
    stored_mib: float = 16.0
    reuse_port: bool = False
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    log_format: str = "text"
    otlp_endpoint: str | None = None
    drain: float = 30.0
    adapters_root: str | None = None
    admin_keys: str | None = None
    api_keys: str | None = None
    cors_origins: list[str] = field(default_factory=list)
    generation: Any = None
