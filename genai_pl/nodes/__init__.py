"""Typed nodes of the configuration, so that a typo or a wrong type fails while it is composed; conf/ explains the fields."""

from genai_pl.nodes.commands import Evaluate, Export, Feedback, Generate, Serve
from genai_pl.nodes.data import Chat, Data, Pairs, Preference, Prompts, Seq2Seq, Unpaired
from genai_pl.nodes.training import Plan, Root, Wrapped
from genai_pl.specs import GenerationConfig, ModelConfig

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
