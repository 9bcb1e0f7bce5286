"""Pretraining an encoder-decoder on hidden spans."""

from genai_pl.modules.seq2seq import Seq2SeqModule
from genai_pl.objectives import SpanCorruptionCollator


class SpanCorruptionModule(Seq2SeqModule):
    """The decoder says what stood in the spans that the encoder saw as sentinels."""

    data_kind = "text"
    needs = ("sentinels",)
    make_collator = SpanCorruptionCollator

    def make_prompt(self, text: str) -> str:
        """A text with a gap to fill."""
        return f"{text} <extra_id_0>"
