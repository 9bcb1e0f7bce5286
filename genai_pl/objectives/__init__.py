"""What a model is trained to do: pure losses, and the collators that make their batches."""

from genai_pl.objectives.clm import CausalLMCollator, causal_lm_loss
from genai_pl.objectives.contrastive import info_nce, matryoshka, recall_at_k, symmetric_info_nce
from genai_pl.objectives.fim import FimCollator
from genai_pl.objectives.mlm import MaskedLMCollator
from genai_pl.objectives.pairs import PairCollator
from genai_pl.objectives.permutation import PermutationCollator
from genai_pl.objectives.prefix_lm import PrefixLMCollator
from genai_pl.objectives.rows import Collator
from genai_pl.objectives.span_corruption import SpanCorruptionCollator
from genai_pl.objectives.tokens import IGNORED, masked_accuracy, token_loss
from genai_pl.objectives.vocabulary import Vocabulary

__all__ = [
    "IGNORED",
    "CausalLMCollator",
    "Collator",
    "FimCollator",
    "MaskedLMCollator",
    "PairCollator",
    "PermutationCollator",
    "PrefixLMCollator",
    "SpanCorruptionCollator",
    "Vocabulary",
    "causal_lm_loss",
    "info_nce",
    "masked_accuracy",
    "matryoshka",
    "recall_at_k",
    "symmetric_info_nce",
    "token_loss",
]
