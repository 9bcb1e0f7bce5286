"""Schemas of the group `data`: one for each kind of training data; conf/data/*.yaml explain the fields."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class DataSchema:
    """Fields of every kind of data: files, validation split, sequence length in tokens, batch sizes in rows,
    workers.
    """

    path: str = MISSING
    val_path: str | None = None
    val_fraction: float = 0.1
    seq_len: int = MISSING
    batch_size: int = MISSING
    val_batch_size: int | None = None
    workers: int = 0
    shuffle: bool = True


@dataclass
class MixableSchema(DataSchema):
    """Fields of data that may come from several sources: what they are, and how they are weighed."""

    sources: Any = None
    mix_by: str = "tokens"
    mix_temperature: float = 1.0


@dataclass
class TextSchema(MixableSchema):
    """Documents for language modelling, cut or packed into rows of seq_len tokens."""

    _target_: str = "genai_pl.data.text.TextDataModule"
    column: str = "text"
    streaming: bool = False
    block_rows: int = 1024
    val_documents: int = 100
    separate_documents: bool = True
    deduplicate: str | None = None


@dataclass
class TableSchema(DataSchema):
    """Fields of data in columns: names of columns that the files call otherwise, and repeated rows."""

    columns: dict[str, str] = field(default_factory=dict)
    deduplicate: str | None = None


@dataclass
class PairsSchema(TableSchema, MixableSchema):
    """Anchors with a positive and perhaps a negative text, for embeddings."""

    _target_: str = "genai_pl.data.pairs.PairsDataModule"
    anchor: str = "anchor"
    positive: str | None = "positive"
    negative: str | None = None


@dataclass
class Seq2SeqSchema(TableSchema, MixableSchema):
    """Sources and targets of an encoder-decoder."""

    _target_: str = "genai_pl.data.seq2seq.Seq2SeqDataModule"
    source: str = "source"
    target: str = "target"
    packing: bool = True


@dataclass
class MessagesSchema(TableSchema, MixableSchema):
    """Fields of texts or conversations: the format of the columns, auto by their names."""

    format: str = "auto"


@dataclass
class ChatSchema(MessagesSchema):
    """Conversations, or prompts with completions, to imitate (SFT)."""

    _target_: str = "genai_pl.data.chat.ChatDataModule"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    packing: bool = True


@dataclass
class PreferenceSchema(MessagesSchema):
    """Prompts with a chosen and a rejected completion, perhaps with the margin between them."""

    _target_: str = "genai_pl.data.preference.PreferenceDataModule"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    completions: str = "completions"
    margin: str | None = None


@dataclass
class UnpairedSchema(MessagesSchema):
    """Completions with a label: desirable or not (KTO)."""

    _target_: str = "genai_pl.data.unpaired.UnpairedDataModule"
    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"


@dataclass
class LabelledSchema(TableSchema):
    """Texts, or pairs of texts, with a class, several labels or numbers."""

    _target_: str = "genai_pl.data.labelled.LabelledDataModule"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: list[str] | None = None
    problem_type: str | None = None


@dataclass
class RerankSchema(TableSchema):
    """Queries with documents and their relevance."""

    _target_: str = "genai_pl.data.rerank.RerankDataModule"
    query: str = "query"
    document: str = "documents"
    label: str = "labels"


@dataclass
class TagsSchema(TableSchema):
    """Sentences of words with a tag each."""

    _target_: str = "genai_pl.data.tags.TagsDataModule"
    tokens: str = "tokens"
    tags: str = "tags"
    labels: list[str] | None = None


@dataclass
class StepwiseSchema(TableSchema):
    """Prompts with the steps of an answer and a label for each (process reward models)."""

    _target_: str = "genai_pl.data.stepwise.StepwiseDataModule"
    prompt: str = "prompt"
    completions: str = "completions"
    labels: str = "labels"
    step_separator: str = "\n"
    train_on_last_step_only: bool = False


@dataclass
class PromptsSchema(MessagesSchema):
    """Prompts that the policy answers during training (PPO, GRPO)."""

    _target_: str = "genai_pl.data.prompts.PromptsDataModule"
    prompt: str = "prompt"
    max_prompt_len: int = MISSING
