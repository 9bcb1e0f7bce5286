"""Typed nodes of the configuration, so that a typo or a wrong type fails while it is composed; conf/ explains the fields."""

from genai_pl.cli.schema_commands import Evaluate, Export, Feedback, Generate, Serve
from genai_pl.cli.schema_data import Chat, Data, Pairs, Preference, Prompts, Seq2Seq, Unpaired
from genai_pl.cli.schema_train import Plan, Root, Wrapped
from genai_pl.config.generation import GenerationConfig
from genai_pl.config.model import ModelConfig

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

MAPPINGS = {  # fields of untyped options whose keys are the user's
    "patterns": {"rank_pattern": {}, "alpha_pattern": {}},
    "extra": {"extra": {}},
}
