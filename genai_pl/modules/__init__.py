"""LightningModules: one `step` each."""

from genai_pl.modules.base import BaseModule
from genai_pl.modules.clm import CausalLMModule

__all__ = ["BaseModule", "CausalLMModule"]
