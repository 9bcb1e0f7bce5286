"""Masked language modelling: pretraining an encoder on masked tokens."""

from torch import Tensor

from genai_pl.modules.base import Batch
from genai_pl.modules.token_prediction import TokenModule
from genai_pl.objectives import MaskedLMCollator


class MaskedLMModule(TokenModule):
    """Masked tokens are predicted from both sides; perplexity is over masked tokens (pseudo-perplexity)."""

    shapes = ("encoder",)
    needs = ("mask",)
    sparse = True
    divides_sequences = True
    make_collator = MaskedLMCollator

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.features(batch["input_ids"], batch.get("segment_ids"))

    def generate_options(self, text: str, mask_token: str | None) -> dict[str, object]:
        return {"prompt": masked_words(text, str(mask_token))}


def masked_words(text: str, mask_token: str) -> str:
    """The text with a mask in place of its second word.

    >>> masked_words("The cat sat", "[MASK]"), masked_words("", "[MASK]")
    ('The [MASK] sat', '[MASK]')
    """
    first, _, *rest = [*text.split(), "", ""]
    return " ".join(filter(None, [first, mask_token, *rest]))
