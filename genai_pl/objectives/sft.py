"""Supervised fine-tuning: next-token prediction of the answers only, in packed rows of whole conversations."""

from genai_pl.objectives.clm import CausalLMCollator


class SFTCollator(CausalLMCollator):
    """Batches of causal language modelling in which only tokens whose `loss_mask` (n,) is True are targets.

    Rows of text, which a mixture may have beside conversations, have no mask and learn every token.
    """
