"""Supervised fine-tuning: next-token prediction on completions or on the assistant turns of conversations."""

from genai_pl.modules.clm import CausalLMModule
from genai_pl.objectives.sft import SFTCollator


class SFTModule(CausalLMModule):
    """Next-token prediction of completions, or of assistant turns; prompts and other roles have no label."""

    data_kind = "chat"
    make_collator = SFTCollator
