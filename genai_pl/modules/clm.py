"""Causal language modelling: pretraining and fine-tuning by next-token prediction.

Three modules differ in their collator and mask: from the left, with a bidirectional prefix, and with the middle last.
"""

from torch import Tensor

from genai_pl.modules.base import Batch
from genai_pl.modules.token_prediction import TokenModule
from genai_pl.objectives import CausalLMCollator, FimCollator, PrefixLMCollator


class CausalLMModule(TokenModule):
    """Next-token prediction: each token from those before it in its document (packed rows have several)."""

    shapes = ("decoder",)
    source_kinds = ("text", "chat")  # of a conversation the answers are learned
    divides_sequences = True
    make_collator = CausalLMCollator

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.features(batch["input_ids"], batch.get("segment_ids"))


class PrefixLMModule(CausalLMModule):
    """Prediction of the tokens after a prefix, within which attention is bidirectional (`prefix` (B,) tokens of a row)."""

    source_kinds = ()
    make_collator = PrefixLMCollator

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.features(batch["input_ids"], batch.get("segment_ids"), prefix=batch["prefix"])


class FimModule(CausalLMModule):
    """Next-token prediction on documents whose middle was moved to the end (Bavarian et al. 2022)."""

    source_kinds = ()
    needs = ("fim",)
    make_collator = FimCollator
