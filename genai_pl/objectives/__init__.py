"""What a model is trained to do: pure losses, and the collators that make their batches."""

from genai_pl.objectives.clm import IGNORED, CausalLMCollator, causal_lm_loss

__all__ = ["IGNORED", "CausalLMCollator", "causal_lm_loss"]
