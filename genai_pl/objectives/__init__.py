"""Objectives: pure losses, and the collators that make their batches.

A loss maps tensors to a scalar, with the equation number of its paper, and is independent of the model, logging and
process groups; `genai_pl.modules` calls it. A collator maps a list of examples to a batch of tensors.
"""

from genai_pl.objectives.classify import LabelCollator
from genai_pl.objectives.clm import CausalLMCollator, causal_lm_loss
from genai_pl.objectives.collate import Collator
from genai_pl.objectives.contrastive import info_nce, matryoshka, recall_at_k, symmetric_info_nce
from genai_pl.objectives.fim import FimCollator
from genai_pl.objectives.grpo import completion_weights, group_advantages, grpo_loss, rloo_advantages
from genai_pl.objectives.mlm import MaskedLMCollator
from genai_pl.objectives.pairs import PairCollator
from genai_pl.objectives.permutation import PermutationCollator
from genai_pl.objectives.ppo import (
    adapt_kl_coef,
    clipped_surrogate,
    gae,
    kl_estimate,
    kl_rewards,
    moment_sums,
    policy_loss,
    policy_metrics,
    token_entropy,
    value_loss,
    whiten,
)
from genai_pl.objectives.preference import (
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    orpo_loss,
    preference_metrics,
    robust_dpo_loss,
    segment_ends,
    segment_sums,
    sequence_logprobs,
    simpo_loss,
)
from genai_pl.objectives.preference_collators import (
    PreferenceCollator,
    RankingCollator,
    UnpairedPreferenceCollator,
)
from genai_pl.objectives.prefix_lm import PrefixLMCollator
from genai_pl.objectives.process_reward import StepCollator, process_reward_loss
from genai_pl.objectives.rerank import RerankCollator
from genai_pl.objectives.reward import (
    centering_penalty,
    pairwise_reward_loss,
    plackett_luce_loss,
    ranking_accuracy,
    ranking_loss,
    reward_accuracy,
)
from genai_pl.objectives.seq2seq import Seq2SeqCollator
from genai_pl.objectives.sft import SFTCollator
from genai_pl.objectives.span_corruption import SpanCorruptionCollator
from genai_pl.objectives.special_tokens import SpecialTokens
from genai_pl.objectives.token_classify import TagCollator
from genai_pl.objectives.token_loss import IGNORED, masked_accuracy, token_loss

__all__ = [
    "IGNORED",
    "CausalLMCollator",
    "Collator",
    "LabelCollator",
    "FimCollator",
    "MaskedLMCollator",
    "PairCollator",
    "PermutationCollator",
    "PreferenceCollator",
    "PrefixLMCollator",
    "RankingCollator",
    "RerankCollator",
    "SFTCollator",
    "Seq2SeqCollator",
    "SpanCorruptionCollator",
    "StepCollator",
    "UnpairedPreferenceCollator",
    "SpecialTokens",
    "TagCollator",
    "adapt_kl_coef",
    "causal_lm_loss",
    "centering_penalty",
    "clipped_surrogate",
    "completion_weights",
    "cpo_loss",
    "dpo_loss",
    "gae",
    "group_advantages",
    "grpo_loss",
    "hinge_loss",
    "info_nce",
    "ipo_loss",
    "kl_estimate",
    "kl_rewards",
    "kto_loss",
    "kto_reference_point",
    "masked_accuracy",
    "matryoshka",
    "moment_sums",
    "orpo_loss",
    "pairwise_reward_loss",
    "plackett_luce_loss",
    "policy_loss",
    "policy_metrics",
    "preference_metrics",
    "process_reward_loss",
    "ranking_accuracy",
    "ranking_loss",
    "recall_at_k",
    "reward_accuracy",
    "rloo_advantages",
    "robust_dpo_loss",
    "segment_ends",
    "segment_sums",
    "sequence_logprobs",
    "simpo_loss",
    "symmetric_info_nce",
    "token_entropy",
    "token_loss",
    "value_loss",
    "whiten",
]
