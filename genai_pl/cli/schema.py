"""Schemas: the typed nodes that Hydra composes configuration files into, so that a typo or a wrong type fails at once.

Each file of conf/ names its schema in its defaults list (`/schema/chat@_here_`). Comments in conf/ explain the
fields; the classes hold names, types and defaults only. `Any` marks a group, or an option with several types that
config/bounds.py checks.
"""

from genai_pl.cli.schema_commands import EvaluateSchema, ExportSchema, FeedbackSchema, GenerateSchema, ServeSchema
from genai_pl.cli.schema_data import (
    ChatSchema,
    LabelledSchema,
    PairsSchema,
    PreferenceSchema,
    PromptsSchema,
    RerankSchema,
    Seq2SeqSchema,
    StepwiseSchema,
    TagsSchema,
    TextSchema,
    UnpairedSchema,
)
from genai_pl.cli.schema_train import (
    DataCommandSchema,
    DistillCommandSchema,
    HardwareSpec,
    TrainSchema,
    TransformersModelSchema,
)
from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig

SCHEMAS = {
    "root": TrainSchema,
    "model": ModelConfig,
    "inspect": DataCommandSchema,
    "distill": DistillCommandSchema,
    "plan": HardwareSpec,
    "wrapped": TransformersModelSchema,
    "data": TextSchema,
    "pairs": PairsSchema,
    "seq2seq": Seq2SeqSchema,
    "chat": ChatSchema,
    "preference": PreferenceSchema,
    "unpaired": UnpairedSchema,
    "prompts": PromptsSchema,
    "labelled": LabelledSchema,
    "tags": TagsSchema,
    "stepwise": StepwiseSchema,
    "rerank": RerankSchema,
    "generation": GenerationConfig,
    "generate": GenerateSchema,
    "evaluate": EvaluateSchema,
    "export": ExportSchema,
    "feedback": FeedbackSchema,
    "serve": ServeSchema,
}

OPEN_MAPPINGS = {  # fields of untyped options whose keys are the user's
    "patterns": {"rank_pattern": {}, "alpha_pattern": {}},
    "extra": {"extra": {}},
    "tasks": {"tasks": {}},
}
