"""Pretraining an encoder-decoder on hidden spans."""

from torch import Tensor

from genai_pl.modules.base import Batch
from genai_pl.modules.tokens import TokenModule
from genai_pl.objectives import SpanCorruptionCollator


class SpanCorruptionModule(TokenModule):
    """The decoder says what stood in the spans that the encoder saw as sentinels."""

    shapes = ("encoder_decoder",)
    needs = ("sentinels",)
    make_collator = SpanCorruptionCollator

    def hidden(self, batch: Batch) -> Tensor:
        return self.model.features(
            batch["input_ids"],
            batch.get("segment_ids"),
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_segment_ids=batch.get("decoder_segment_ids"),
        )

    def make_prompt(self, text: str) -> str:
        """A text with a gap to fill."""
        return f"{text} <extra_id_0>"
