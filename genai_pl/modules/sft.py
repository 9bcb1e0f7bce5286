"""Supervised fine-tuning: imitate what examples show the model to say."""

from genai_pl.modules.clm import CausalLMModule
from genai_pl.objectives.sft import SFTCollator


class SFTModule(CausalLMModule):
    """Next-token prediction of completions, or of what assistants say."""

    data_kind = "chat"
    make_collator = SFTCollator
