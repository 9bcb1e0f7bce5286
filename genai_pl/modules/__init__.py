"""LightningModules: one per objective, each with a `step` that returns sums over the targets of one batch."""

from genai_pl.modules.base import BaseModule
from genai_pl.modules.clm import CausalLMModule, FimModule, PrefixLMModule
from genai_pl.modules.contrastive import ContrastiveModule
from genai_pl.modules.distillation import DistillModule
from genai_pl.modules.mlm import MaskedLMModule
from genai_pl.modules.permutation import PermutationModule
from genai_pl.modules.span_corruption import SpanCorruptionModule
from genai_pl.modules.token_prediction import TokenModule

__all__ = [
    "BaseModule",
    "CausalLMModule",
    "ContrastiveModule",
    "DistillModule",
    "FimModule",
    "MaskedLMModule",
    "PermutationModule",
    "PrefixLMModule",
    "SpanCorruptionModule",
    "TokenModule",
]
