"""Pretraining and fine-tuning by next-token prediction, from the left, with a prefix, or with the middle last."""

from torch import Tensor

from genai_pl.modules.base import Batch
from genai_pl.modules.token_prediction import TokenModule
from genai_pl.objectives import CausalLMCollator, FimCollator, PrefixLMCollator


class CausalLMModule(TokenModule):
    """Every token is predicted from those before it."""

    shapes = ("decoder",)
    make_collator = CausalLMCollator

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.features(batch["input_ids"], batch.get("segment_ids"))


class PrefixLMModule(CausalLMModule):
    """The tokens after a prefix are predicted, whose own tokens see each other both ways."""

    make_collator = PrefixLMCollator

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.features(batch["input_ids"], batch.get("segment_ids"), prefix=batch["prefix"])


class FimModule(CausalLMModule):
    """Next-token prediction on documents whose middle was moved to the end."""

    needs = ("fim",)
    make_collator = FimCollator
